"""Paramiko's transport: what is offered to a server, and its last message."""

from __future__ import annotations

import logging
from typing import Any

import paramiko

from cluster.login.config import PUBKEYS, Host
from runfolder.errors import UserError

# What Paramiko raises, in any thread, when the connection or the other side gives up.
BROKEN = (paramiko.SSHException, EOFError, OSError)
# As OpenSSH's own for AES; Paramiko's are far lower, and it may lose a connection whose session
# ends while keys are exchanged again.
REKEY_BYTES, REKEY_PACKETS = 1 << 36, 1 << 31
# Fewer and larger packets than Paramiko's, which cost it time; OpenSSH goes up to 256 KiB.
PACKET_BYTES = 128 << 10
# By the keywords of ssh_config.
OPTIONS = {"kexalgorithms": "kex", "hostkeyalgorithms": "key_types", "macs": "digests"}
OPTIONS |= {"ciphers": "ciphers"}
WEAK = ("cbc", "md5", "sha1")

# Paramiko logs errors that we report in one line; with no handler, Python prints them.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False


class Link(paramiko.Transport):  # type: ignore[misc]
    """Paramiko's transport, with the last message of the server."""

    def __init__(self, sock: Any, host: Host) -> None:
        """Prepare; a `UserError` if none of the allowed algorithms is supported."""
        super().__init__(sock, default_max_packet_size=PACKET_BYTES)
        self.last_words = ""
        self.packetizer.REKEY_BYTES, self.packetizer.REKEY_PACKETS = REKEY_BYTES, REKEY_PACKETS
        options = self.get_security_options()
        for key, kind in OPTIONS.items():
            known = [x for x in getattr(options, kind) if not any(weak in x for weak in WEAK)]
            allowed = host.algorithms.get(key, known)
            # The fastest in Python first: authenticated encryption needs no second pass.
            known.sort(key=lambda name: "gcm" not in name)
            if not (found := [name for name in known if name in allowed]):
                raise UserError(
                    f"{host.alias}: {key} {','.join(allowed)}: none of them is supported here; "
                    f"allow another in ssh_config, such as {known[0]}"
                )
            setattr(options, kind, found)
        # How an RSA key may sign; keys.py leaves out other types of keys that are not allowed.
        signs = host.algorithms.get(PUBKEYS, self.preferred_pubkeys)
        unwanted = [name for name in self.preferred_pubkeys if name not in signs]
        self.disabled_algorithms["pubkeys"] = unwanted

    def _parse_disconnect(self, m: Any) -> None:
        m.get_int()
        self.last_words = m.get_string().decode(errors="replace")
