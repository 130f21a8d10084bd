"""Paramiko's transport with what a client needs beside it: what was heard last, and the last word.

It stands between the sockets and the sign-in, and knows nothing of either.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import paramiko
from paramiko.packet import Packetizer

# What Paramiko raises, in any thread, when the connection or the other side gives up.
BROKEN = (paramiko.SSHException, EOFError, OSError)
CERTIFICATE = "-cert-v01@openssh.com"
# The strong ones that Paramiko knows, the quickest in Python first: authenticated encryption needs
# no second pass. Without Ciphers, MACs, ... of the user's own these are all that is offered.
KEX = (
    "mlkem768x25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
    "diffie-hellman-group16-sha512",
    "diffie-hellman-group-exchange-sha256",
    "diffie-hellman-group14-sha256",
)
CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
)
MACS = (
    "hmac-sha2-256-etm@openssh.com",
    "hmac-sha2-512-etm@openssh.com",
    "hmac-sha2-256",
    "hmac-sha2-512",
)
HOST_KEYS = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
)

# RFC 4250, section 4.1.2: from here on the numbers are not of the transport and its keys.
FIRST_AFTER_KEX = 50

# Paramiko logs errors that are told here in one line; with no handler, Python prints them.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False


class Ear(Packetizer):  # type: ignore[misc]
    """Notes when the other side was last heard; limits the first exchange without a timer's thread.

    For Paramiko's a process that gives up has to wait, to the timer's end.
    """

    last_heard = 0.0
    _deadline: float | None = None

    def start_handshake(self, timeout: float) -> None:
        """Set how long the first key exchange may take."""
        self._deadline = time.monotonic() + timeout

    def handshake_timed_out(self) -> bool:
        """Return whether it took longer."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def complete_handshake(self) -> None:
        """Note that it was in time; Paramiko calls it after each packet, also the first of all."""
        if self._initial_kex_done:
            self._deadline = None

    def read_message(self) -> Any:
        """Return the next packet."""
        message = super().read_message()
        self.last_heard = time.monotonic()
        return message


class Link(paramiko.Transport):  # type: ignore[misc]
    """One hop's transport, over any socket."""

    def __init__(
        self, sock: Any, algorithms: Mapping[str, Sequence[str]], *, is_compressed: bool
    ) -> None:
        """Prepare the transport; nothing is sent yet.

        Args:
            sock: a socket, or a channel of the hop before.
            algorithms: by the names of ssh_config in lower case, those that the user allows.
            is_compressed: whether to ask for compression.

        Raises:
            ValueError: none of the algorithms that the user allows is known here; says which.
        """
        super().__init__(sock, packetizer_class=Ear)
        self.last_words = ""
        """What the server said when it disconnected."""
        self.given_up: Exception | None = None
        """Why it was ended from here; the thread that reads then only finds it closed."""
        self.use_compression(is_compressed)
        options = self.get_security_options()
        options.kex = self._allowed(options.kex, KEX, algorithms, "kexalgorithms")
        options.ciphers = self._allowed(options.ciphers, CIPHERS, algorithms, "ciphers")
        options.digests = self._allowed(options.digests, MACS, algorithms, "macs")
        self.host_key_blob: bytes | None = None
        """The server's host key or host certificate as it came, once its signature was right."""
        self.first_signature = b""
        """The server's, of the session's id, by that key."""
        self._host_key_algorithms: tuple[str, ...] = ()
        self._held: list[Any] = []

    @staticmethod
    def _allowed(
        known: Sequence[str], ours: Sequence[str], algorithms: Mapping[str, Sequence[str]], key: str
    ) -> tuple[str, ...]:
        # What the user names may also be older than what is offered unasked.
        order = [*ours, *(name for name in known if name not in ours)]
        allowed = algorithms.get(key, ours)
        found = tuple(name for name in order if name in known and name in allowed)
        if not found:
            raise ValueError(f"{key} {','.join(allowed)}: none of them is known")
        return found

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """The host key algorithms, for the key exchange; Paramiko would add all certificates."""
        return self._host_key_algorithms

    def offer_host_keys(self, names: Sequence[str]) -> None:
        """Set which host keys the server may show, the one that is wanted most first."""
        self._host_key_algorithms = tuple(names)

    @property
    def last_heard(self) -> float:
        """When the last packet came, by time.monotonic()."""
        return float(self.packetizer.last_heard)

    def _verify_key(self, host_key: bytes, sig: bytes) -> None:
        known = self.host_key_blob
        super()._verify_key(host_key, sig)
        # The first was checked against known_hosts. Each new exchange must show the same.
        if known is not None and not hmac.compare_digest(known, host_key):
            raise paramiko.SSHException("the host key changed in the middle of the connection")
        if known is None:
            self.first_signature = sig
        self.host_key_blob = host_key

    # ---- what this thread answers in the middle of a key exchange ----
    #
    # Paramiko sends some of it at once, which the protocol forbids, and for the rest waits for the
    # new keys in the one thread that can take them. Here it is held back until they are in use.

    def _send_message(self, data: Any) -> None:
        is_early = not self.clear_to_send.is_set() and data.asbytes()[0] >= FIRST_AFTER_KEX
        if is_early and threading.current_thread() is self:
            self._held.append(data)
        else:
            super()._send_message(data)

    def _send_user_message(self, data: Any) -> None:
        if threading.current_thread() is not self:
            super()._send_user_message(data)
        elif self.active:
            self._send_message(data)

    def _parse_newkeys(self, m: Any) -> None:
        super()._parse_newkeys(m)
        held, self._held = self._held, []
        for message in held:
            self._send_message(message)

    def _parse_disconnect(self, m: Any) -> None:
        m.get_int()
        self.last_words = m.get_string().decode(errors="replace")
