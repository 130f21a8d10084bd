"""The user's keys for authentication, in files and in ssh-agent, with their certificates.

Paramiko signs at once and cannot ask first whether a key would be accepted, so keys that need a
passphrase come last.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import paramiko
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from paramiko import SSHException
from paramiko.pkey import PublicBlob, UnknownKeyType

from cluster.login.config import PUBKEYS, Host
from cluster.login.prompts import Prompts
from runfolder.errors import UserError

PASSPHRASE_TRIES = 3
CERTIFICATE = "-cert-v01@openssh.com"
# What Paramiko and the library below it raise for a key file that they cannot load.
UNREADABLE = (ValueError, SSHException, UnknownKeyType, InvalidTag, UnsupportedAlgorithm)


@dataclass(kw_only=True)
class Keys:
    """The keys that a host's configuration names."""

    host: Host
    prompts: Prompts
    problems: list[str] = field(default_factory=list)
    """Problems with keys, for the message if the sign-in fails."""

    def candidates(self) -> Iterator[tuple[str, paramiko.PKey]]:
        """Yield the keys, each with a name for messages.

        The agent's keys, those that the configuration names first; then files, encrypted ones last.
        A key that has a certificate is offered with it first, then without.
        """
        paths = [Path(name) for name in self.host.identity_files]
        named = {blob for path in paths if (blob := _public_blob(path)) is not None}
        held = sorted(self._in_agent(), key=lambda key: key.asbytes() not in named)
        for key in held:
            self._let_it_refuse(key)
            # IdentitiesOnly: other keys in the agent are not offered.
            if not self.host.identities_only or key.asbytes() in named:
                yield from self._forms(f"ssh-agent: {key.comment}", key)
        in_agent = {key.asbytes() for key in held}
        sealed = []
        for path in paths:
            if not path.exists() or _public_blob(path) in in_agent:
                continue
            try:
                key = _load(path, None)
            except TypeError:
                sealed.append(path)
            except (*UNREADABLE, OSError) as error:
                self.problems.append(f"{path}: {str(error).partition('. ')[0]}")
            else:
                if key.asbytes() not in in_agent:
                    yield from self._forms(str(path), key)
        # In batch mode nobody is asked for a passphrase.
        for path in [] if self.host.batch_mode else sealed:
            if (key := self._unsealed(path)) is not None:
                yield from self._forms(str(path), key)

    def _in_agent(self) -> list[paramiko.AgentKey]:
        # Paramiko looks for its socket here and nowhere else.
        before = os.environ.get("SSH_AUTH_SOCK", "")
        os.environ["SSH_AUTH_SOCK"] = self.host.identity_agent
        try:
            return list(paramiko.Agent().get_keys())
        except (SSHException, OSError) as error:
            self.problems.append(f"ssh-agent: {error}")
            return []
        finally:
            os.environ["SSH_AUTH_SOCK"] = before

    def _let_it_refuse(self, key: paramiko.AgentKey) -> None:
        """Use an empty signature, which no server accepts, if the agent gives none.

        Paramiko would end the connection: a key may need to be touched, or confirmed by the user.
        """
        sign = key.sign_ssh_data

        def signed(data: bytes, algorithm: str | None = None) -> bytes:
            try:
                return bytes(sign(data, algorithm))
            except SSHException:
                self.problems.append(f"ssh-agent: it refused to sign with {key.comment}")
                return b""

        key.sign_ssh_data = signed

    def _unsealed(self, path: Path) -> paramiko.PKey | None:
        for _ in range(PASSPHRASE_TRIES):
            try:
                given = self.prompts.secret(f"Passphrase for the key {path}: ")
            except UserError as error:
                self.problems.append(str(error))
                return None
            # As with ssh, an empty passphrase skips the key.
            if not given:
                break
            with contextlib.suppress(*UNREADABLE):
                return _load(path, given.encode(errors="surrogateescape"))
        self.problems.append(f"{path}: the correct passphrase was not given")
        return None

    def _forms(self, name: str, key: paramiko.PKey) -> Iterator[tuple[str, paramiko.PKey]]:
        """Yield a key with each of its certificates, and without one."""
        files = [Path(file) for file in self.host.certificate_files]
        files += [
            Path(f"{file.removesuffix('.pub')}-cert.pub") for file in self.host.identity_files
        ]
        for file in dict.fromkeys(files):
            with contextlib.suppress(OSError, ValueError):
                text = file.read_text()
                certificate = PublicBlob.from_string(text)
                # A certificate contains the public key, after the name of its type.
                part = key.asbytes()[4 + len(key.get_name()) :]
                if certificate.key_type.endswith(CERTIFICATE) and part in certificate.key_blob:
                    key.load_certificate(text)
                    if self._is_allowed(key):
                        yield str(file), key
        # A key in the agent may be a certificate already.
        is_certificate = key.get_name().endswith(CERTIFICATE)
        blob = PublicBlob(key.get_name(), key.blob) if is_certificate else None
        key.public_blob = blob
        if self._is_allowed(key):
            yield name, key

    def _is_allowed(self, key: paramiko.PKey) -> bool:
        """Return whether PubkeyAcceptedAlgorithms allows a way to sign with a key, as it is now."""
        allowed = self.host.algorithms.get(PUBKEYS)
        kind = key.public_blob.key_type if key.public_blob else key.get_name()
        ways = {kind}
        if kind.removesuffix(CERTIFICATE) == "ssh-rsa":
            ways = {kind.replace("ssh-rsa", way) for way in ("rsa-sha2-256", "rsa-sha2-512")}
        if allowed is None or ways & set(allowed):
            return True
        self.problems.append(f"PubkeyAcceptedAlgorithms does not allow a key of type {kind}")
        return False


def _load(path: Path, passphrase: bytes | None) -> paramiko.PKey:
    """Return a private key; raises TypeError if a passphrase is missing, and `UNREADABLE`."""
    found = path.stat()
    if found.st_uid == os.getuid() and found.st_mode & 0o077:
        raise ValueError(f"others may read it; chmod 600 {path}")
    key: paramiko.PKey = paramiko.PKey.from_path(path, passphrase)
    return key


def _public_blob(path: Path) -> bytes | None:
    """Return the public key of a private or public key file, if it can be read without a secret."""
    for file in (path, Path(f"{path}.pub")):
        with contextlib.suppress(OSError, ValueError, SSHException):
            blob: bytes = PublicBlob.from_string(file.read_text()).key_blob
            return blob
    return None
