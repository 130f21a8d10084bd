"""The keys that may prove who the user is: in files and in ssh-agent, with their certificates."""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import UnsupportedAlgorithm

from cluster.login import private_key
from cluster.login.agent import Agent, AgentError, AgentKey, Binding
from cluster.login.config import Host
from cluster.login.link import CERTIFICATE
from cluster.login.private_key import PassphraseMissing, PrivateKey
from cluster.login.prompts import Prompts
from runfolder.errors import UserError

PASSPHRASE_TRIES = 3
SECURITY_KEY = "sk-"


class KeyUnusable(Exception):
    """A private key cannot be had; the text says which and why."""


class Signer(Protocol):
    """Where a private key is: a file or the agent."""

    def sign(self, data: bytes, algorithm: str) -> bytes:
        """Return the signature of `data`, in SSH's encoding.

        Raises:
            KeyUnusable: it cannot be had.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A public key, or a certificate, that a server may accept."""

    name: str
    """For messages."""
    blob: bytes
    signer: Signer

    @property
    def kind(self) -> str:
        """Its type, such as ssh-ed25519 or ssh-ed25519-cert-v01@openssh.com."""
        return kind_of(self.blob)


class AgentSigner:
    """A key in the agent."""

    def __init__(self, agent: Agent, key: AgentKey) -> None:
        self._agent = agent
        self._key = key

    def sign(self, data: bytes, algorithm: str) -> bytes:
        """Return the agent's signature."""
        try:
            return self._agent.sign(self._key.blob, data, algorithm)
        except AgentError as error:
            raise KeyUnusable(f"ssh-agent: {self._key.comment}: {error}") from None


class KeyFile:
    """A private key in a file, opened with its passphrase when a signature is wanted."""

    def __init__(self, path: Path, prompts: Prompts) -> None:
        self._path = path
        self._prompts = prompts
        self._key: PrivateKey | None = None

    def sign(self, data: bytes, algorithm: str) -> bytes:
        """Return a signature by the key."""
        return private_key.signature(self.open(), data, algorithm.removesuffix(CERTIFICATE))

    def open(self) -> PrivateKey:
        """Return the key; asks for its passphrase, a few times.

        Raises:
            KeyUnusable: the file cannot be read, or no passphrase opens it.
        """
        if self._key is None:
            try:
                self._key = self._load()
            except OSError as error:
                raise KeyUnusable(f"{self._path}: {error.strerror}") from None
            except (ValueError, UnsupportedAlgorithm) as error:
                raise KeyUnusable(f"{self._path}: {error}") from None
        return self._key

    def _load(self) -> PrivateKey:
        _refuse_open_file(self._path)
        data = self._path.read_bytes()
        try:
            return private_key.load(data, None)
        except PassphraseMissing:
            pass
        for _ in range(PASSPHRASE_TRIES):
            try:
                given = self._prompts.secret(f"Passphrase for the key {self._path}: ")
            except UserError as error:
                raise KeyUnusable(str(error)) from None
            # As with ssh, nothing typed means: not this key.
            if not given:
                break
            try:
                return private_key.load(data, given.encode(errors="surrogateescape"))
            except ValueError:
                continue
        raise KeyUnusable(f"{self._path}: its passphrase was not given")


@dataclass(kw_only=True)
class Keys:
    """What a host's configuration names, found once for all questions of a server."""

    host: Host
    prompts: Prompts
    binding: Binding
    """The session that the agent's signatures are for."""
    problems: list[str] = field(default_factory=list)
    """What stood in the way of keys, for the message if nobody is let in."""
    agent: Agent | None = None

    def close(self) -> None:
        """End the connection to the agent."""
        if self.agent is not None:
            self.agent.close()

    def candidates(self) -> Iterator[Candidate]:
        """Yield the keys in OpenSSH's order: certificates, the agent's, files.

        A file of an old format that has to be opened to be compared comes last.
        """
        in_agent = self._agent_keys()
        files, sealed = self._files()
        named = set(files)
        yield from self._certificates(files, in_agent)
        ordered = sorted(in_agent.values(), key=lambda key: key.blob not in named)
        for key in ordered:
            # IdentitiesOnly: what the agent holds beside is not offered.
            if key.blob in named or not self.host.identities_only:
                assert self.agent is not None
                signer = AgentSigner(self.agent, key)
                yield Candidate(name=f"ssh-agent: {key.comment}", blob=key.blob, signer=signer)
        for blob, path in files.items():
            if blob not in in_agent and self._is_usable(path, blob):
                yield Candidate(
                    name=str(path), blob=blob, signer=KeyFile(_private(path), self.prompts)
                )
        for path in sealed:
            key_file = KeyFile(path, self.prompts)
            try:
                blob = private_key.public_blob(key_file.open())
            except KeyUnusable as error:
                self.problems.append(str(error))
                continue
            yield Candidate(name=str(path), blob=blob, signer=key_file)

    def _agent_keys(self) -> dict[bytes, AgentKey]:
        if not self.host.identity_agent:
            return {}
        try:
            if self.agent is None:
                self.agent = Agent(self.host.identity_agent)
                # As with ssh, an agent that makes nothing of it may still sign.
                with contextlib.suppress(AgentError):
                    self.agent.bind(self.binding, is_forwarding=False)
            return {key.blob: key for key in self.agent.identities()}
        except AgentError as error:
            self.problems.append(f"ssh-agent: {error}")
            return {}

    def _files(self) -> tuple[dict[bytes, Path], list[Path]]:
        """Return the files by the public keys that they tell, and those that tell none."""
        told: dict[bytes, Path] = {}
        sealed = []
        for path in map(Path, self.host.identity_files):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                # The private half may be in the agent.
                data = b""
            except OSError as error:
                self.problems.append(f"{path}: {error.strerror}")
                continue
            blob = private_key.readable_blob(data) or public_key(data) or _beside(path)
            if blob is not None:
                told.setdefault(blob, path)
            elif data:
                sealed.append(path)
        return told, sealed

    def _certificates(
        self, files: dict[bytes, Path], in_agent: dict[bytes, AgentKey]
    ) -> Iterator[Candidate]:
        paths = [Path(name) for name in self.host.certificate_files]
        paths += [Path(f"{_private(path)}-cert.pub") for path in files.values()]
        for path in dict.fromkeys(paths):
            try:
                blob = public_key(path.read_bytes())
            except FileNotFoundError:
                continue
            except OSError as error:
                self.problems.append(f"{path}: {error.strerror}")
                continue
            plain = plain_blob(blob) if blob else None
            if blob is None or plain is None:
                self.problems.append(f"{path}: is not a certificate of a type that is known here")
            elif plain in in_agent and self.agent is not None:
                signer: Signer = AgentSigner(self.agent, in_agent[plain])
                yield Candidate(name=str(path), blob=blob, signer=signer)
            elif plain in files and self._is_usable(files[plain], plain):
                signer = KeyFile(_private(files[plain]), self.prompts)
                yield Candidate(name=str(path), blob=blob, signer=signer)

    def _is_usable(self, path: Path, blob: bytes) -> bool:
        if not _private(path).exists():
            self.problems.append(f"{path}: its private half is neither here nor in ssh-agent")
            return False
        if kind_of(blob).startswith(SECURITY_KEY):
            self.problems.append(f"{path}: is a security key, which has to be in ssh-agent")
            return False
        return True


def kind_of(blob: bytes) -> str:
    """Return the type of a public key or certificate."""
    return blob[4 : 4 + int.from_bytes(blob[:4], "big")].decode(errors="replace")


def public_key(data: bytes) -> bytes | None:
    """Return the key of a line TYPE BASE64 [COMMENT], as in a .pub file."""
    words = data.split(None, 2)
    if len(words) < 2:
        return None
    try:
        blob = base64.b64decode(words[1], validate=True)
    except binascii.Error:
        return None
    return blob if kind_of(blob).encode() == words[0] else None


def plain_blob(certificate: bytes) -> bytes | None:
    """Return the public key that a certificate is for."""
    kind = kind_of(certificate)
    plain = kind.removesuffix(CERTIFICATE)
    # How many fields the key itself has; a nonce comes before them.
    fields = {"ssh-rsa": 2, "ssh-ed25519": 1}.get(plain, 2 if plain.startswith("ecdsa-") else 0)
    if plain == kind or not fields:
        return None
    rest = certificate[4 + len(kind) :]
    parts = []
    for _ in range(1 + fields):
        end = 4 + int.from_bytes(rest[:4], "big")
        parts.append(rest[:end])
        rest = rest[end:]
    return private_key.string(plain.encode()) + b"".join(parts[1:])


def _beside(path: Path) -> bytes | None:
    """Return the public key in the file beside a private one, if it is there."""
    try:
        return public_key(Path(f"{path}.pub").read_bytes())
    except OSError:
        return None


def _private(path: Path) -> Path:
    """Return the private key's file for one that IdentityFile names, which may be the .pub."""
    private = path.with_suffix("")
    return private if path.suffix == ".pub" and private.exists() else path


def _refuse_open_file(path: Path) -> None:
    found = path.stat()
    if found.st_uid == os.getuid() and found.st_mode & 0o077:
        raise ValueError(f"others may read it; chmod 600 {path}")
