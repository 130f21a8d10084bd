"""ssh-agent, spoken to by its socket: which keys it holds, a signature by one, its forwarding."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any, Self

import paramiko

from cluster.login.link import Link
from runfolder.errors import UserError

REQUEST_IDENTITIES, IDENTITIES_ANSWER = 11, 12
SIGN_REQUEST, SIGN_RESPONSE = 13, 14
FAILURE, SUCCESS, EXTENSION = 5, 6, 27
SESSION_BIND = b"session-bind@openssh.com"
# draft-ietf-sshm-ssh-agent: which hash an RSA key signs with.
RSA_FLAGS = {"rsa-sha2-256": 2, "rsa-sha2-512": 4}
LONGEST_ANSWER_BYTES = 256 * 1024
# A key may want to be touched or confirmed.
TIMEOUT_S = 300
BLOCK_BYTES = 1 << 15
# The far side may be gone at any point, and each half of a pair may find it out first.
GONE = (OSError, EOFError, paramiko.SSHException)


class AgentError(Exception):
    """The agent is gone, or does not do what it was asked."""


@dataclass(frozen=True, kw_only=True)
class AgentKey:
    """A key, or a certificate, that the agent can sign with."""

    blob: bytes
    comment: str

    @property
    def kind(self) -> str:
        """Its type, such as ssh-ed25519."""
        return self.blob[4 : 4 + int.from_bytes(self.blob[:4], "big")].decode(errors="replace")


@dataclass(frozen=True, kw_only=True)
class Binding:
    """The session that an agent is used for (PROTOCOL.agent of OpenSSH, section 1)."""

    host_key: bytes
    session_id: bytes
    signature: bytes
    """Of the session's id, by the host key."""

    @classmethod
    def of(cls, link: Link) -> Self:
        """Return the binding to a link whose first key exchange is over."""
        assert link.host_key_blob is not None and link.session_id is not None
        return cls(
            host_key=link.host_key_blob,
            session_id=link.session_id,
            signature=link.first_signature,
        )


class Agent:
    """A connection to the agent; a context manager that ends it."""

    def __init__(self, path: str) -> None:
        """Connect.

        Raises:
            AgentError: nothing answers at this socket.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT_S)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise AgentError(f"{path}: {error.strerror or error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def identities(self) -> list[AgentKey]:
        """Return the keys that it holds.

        Raises:
            AgentError: it does not say.
        """
        kind, body = self._ask(bytes([REQUEST_IDENTITIES]))
        if kind != IDENTITIES_ANSWER or len(body) < 4:
            raise AgentError("it does not list its keys")
        count, rest = int.from_bytes(body[:4], "big"), body[4:]
        found = []
        for _ in range(count):
            blob, rest = _string(rest)
            comment, rest = _string(rest)
            found.append(AgentKey(blob=blob, comment=comment.decode(errors="replace")))
        return found

    def sign(self, blob: bytes, data: bytes, algorithm: str) -> bytes:
        """Return the signature of `data` by a key, in SSH's encoding.

        Raises:
            AgentError: the agent refuses, or the user has refused it.
        """
        flags = RSA_FLAGS.get(algorithm.removesuffix("-cert-v01@openssh.com"), 0)
        packed = b"".join(struct.pack(">I", len(part)) + part for part in (blob, data))
        kind, body = self._ask(bytes([SIGN_REQUEST]) + packed + struct.pack(">I", flags))
        if kind != SIGN_RESPONSE:
            raise AgentError("it refused to sign")
        return _string(body)[0]

    def bind(self, binding: Binding, *, is_forwarding: bool) -> None:
        """Tell which session this connection is for, before anything else is asked.

        By it an agent knows a host that asks from a program here: a key may be meant for some
        hosts only, and no host may have it load a library (CVE-2023-38408).

        Raises:
            AgentError: it refuses, or is gone.
        """
        parts = (SESSION_BIND, binding.host_key, binding.session_id, binding.signature)
        packed = b"".join(struct.pack(">I", len(part)) + part for part in parts)
        kind, _ = self._ask(bytes([EXTENSION]) + packed + bytes([is_forwarding]))
        # FAILURE is also what an agent says that does not know of it; ssh goes on then, too.
        if kind not in (SUCCESS, FAILURE):
            raise AgentError("it refuses the session")

    def detach(self) -> socket.socket:
        """Return the socket, for who speaks to the agent from here on; it has no time limit."""
        self._socket.settimeout(None)
        return self._socket

    def _ask(self, message: bytes) -> tuple[int, bytes]:
        try:
            self._socket.sendall(struct.pack(">I", len(message)) + message)
            size = int.from_bytes(self._exactly(4), "big")
            if not 0 < size <= LONGEST_ANSWER_BYTES:
                raise AgentError("its answer is none")
            answer = self._exactly(size)
        except OSError as error:
            raise AgentError(str(error.strerror or error)) from None
        return answer[0], answer[1:]

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            if not more:
                raise AgentError("it closed the connection")
            data += more
        return data


def _string(data: bytes) -> tuple[bytes, bytes]:
    end = 4 + int.from_bytes(data[:4], "big")
    if len(data) < 4 or len(data) < end:
        raise AgentError("its answer is cut off")
    return data[4:end], data[end:]


def forward(channel: Any, path: str, binding: Binding) -> None:
    """Let the far side of a session channel use the agent at `path`.

    Args:
        channel: of a session whose command has not begun.
        path: the agent's socket.
        binding: to the session's connection; the agent is told of it before it hears anything.

    Raises:
        UserError: nothing answers there.
    """
    try:
        Agent(path).close()
    except AgentError as error:
        raise UserError(
            f"agent forwarding: {error}; start ssh-agent, or leave ForwardAgent out"
        ) from None

    def serve(remote: Any) -> None:
        # Called in the thread that reads the connection, which waits for no agent. As a daemon: a
        # far side that never hangs up holds nothing up.
        threading.Thread(target=_serve, args=(remote, path, binding), daemon=True).start()

    channel.request_forward_agent(serve)


def _serve(remote: Any, path: str, binding: Binding) -> None:
    try:
        local = Agent(path)
    except AgentError:
        _end(remote)
        return
    try:
        local.bind(binding, is_forwarding=True)
    except AgentError:
        local.close()
        _end(remote)
        return
    stream = local.detach()
    threading.Thread(target=_pump, args=(stream, remote), daemon=True).start()
    _pump(remote, stream)


def _pump(source: Any, target: Any) -> None:
    with contextlib.suppress(*GONE):
        while data := source.recv(BLOCK_BYTES):
            target.sendall(data)
    for stream in (source, target):
        _end(stream)


def _end(stream: Any) -> None:
    """Close a stream from which the other half may be reading, which a mere close does not wake."""
    with contextlib.suppress(*GONE):
        stream.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(*GONE):
        stream.close()
