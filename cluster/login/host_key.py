"""Is this server the one that is known? Asked before anything secret is sent."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    SSHCertificateType,
    load_ssh_public_identity,
)

from cluster.login import known_hosts
from cluster.login.config import Host
from cluster.login.known_hosts import Entry, Known
from cluster.login.link import CERTIFICATE, HOST_KEYS
from cluster.login.prompts import Prompts
from runfolder.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is known of a host, to compare its key with."""

    host: Host
    known: Known

    def algorithms(self) -> list[str]:
        """Return the host key algorithms to offer, those first whose keys can be compared.

        Raises:
            UserError: the user allows none that is known here.
        """
        allowed = self.host.algorithms.get("hostkeyalgorithms")
        names = list(HOST_KEYS)
        kinds = {entry.kind for entry in self._keys}
        names.sort(key=lambda name: kind_of(name) not in kinds)
        if self.known.authorities:
            names = [f"{name}{CERTIFICATE}" for name in HOST_KEYS] + names
        if allowed is not None:
            names = [name for name in names if name in allowed]
        if not names:
            raise UserError(
                f"HostKeyAlgorithms {','.join(allowed or ())}: none of them is known here; "
                f"for {self.host.alias} allow one of {', '.join(HOST_KEYS)}"
            )
        return names

    def check(self, shown: bytes, prompts: Prompts, say: Callable[[str], None]) -> None:
        """Return if the key that the server has shown is to be trusted.

        Raises:
            UserError: it is not.
        """
        for note in self.known.notes:
            say(f"note: {note}")
        kind, blob, certificate = _parse(shown, self.host)
        self._refuse_revoked(blob)
        self._refuse_short(kind, blob, "its host key")
        if certificate is not None and self._is_certified(certificate):
            return
        if any(entry.blob == blob for entry in self._keys):
            return
        name = self.host.known_as
        seen = f"{_short(kind)} key {known_hosts.fingerprint(blob)}"
        if self.known.keys:
            raise self._changed(seen, kind)
        if self.host.strict_host_key_checking == "yes":
            raise UserError(
                f"{name}: its host key is not known ({seen}), and StrictHostKeyChecking is on; "
                f"add the line that the site gives to {self._file or 'known_hosts'}"
            )
        if self.host.strict_host_key_checking == "ask":
            self._ask(seen, prompts)
        self._remember(kind, blob, say)

    @property
    def _keys(self) -> list[Entry]:
        # Another server on the same machine may have the key of the name without the port.
        return self.known.keys or self.known.portless

    @property
    def _file(self) -> str:
        return next(iter(self.host.user_known_hosts_files), "")

    def _refuse_revoked(self, *blobs: bytes) -> None:
        for entry in self.known.revoked:
            if entry.blob in blobs:
                raise UserError(
                    f"{self.host.known_as}: its host key is revoked ({entry.where}); whoever "
                    "answers may have stolen it. Ask the site"
                )

    def _refuse_short(self, kind: str, blob: bytes, what: str) -> None:
        least = self.host.required_rsa_size
        if kind == "ssh-rsa" and (bits := _rsa_bits(blob)) < least:
            raise UserError(
                f"{self.host.known_as}: {what} is of RSA with {bits} bits, and RequiredRSASize is "
                f"{least}; ask the site for a longer one"
            )

    def _is_certified(self, certificate: SSHCertificate) -> bool:
        """Return whether an authority that is known for the host has signed; refuse a bad one."""
        name = self.host.known_as
        signer = _blob(certificate.signature_key())
        self._refuse_revoked(signer)
        entry = next((entry for entry in self.known.authorities if entry.blob == signer), None)
        if entry is None:
            return False
        self._refuse_short(entry.kind, signer, f"the authority of {entry.where}")
        wrong = _fault(
            certificate,
            self.host.host_key_alias or self.host.hostname,
            self.host.algorithms.get("casignaturealgorithms"),
        )
        if wrong:
            raise UserError(
                f"{name}: its host certificate is not valid: {wrong} (authority of {entry.where}); "
                "ask the site"
            )
        return True

    def _changed(self, seen: str, kind: str) -> UserError:
        same = [entry for entry in self.known.keys if entry.kind == kind]
        entry = (same or self.known.keys)[0]
        what = (
            f"its host key is not the one of {entry.where}"
            if same
            else f"it has shown no host key of a type that is known ({entry.where})"
        )
        file = entry.where.rpartition(":")[0]
        return UserError(
            f"{self.host.known_as}: {what} but {seen}; someone may be listening in, or the server "
            f"was set up anew. Ask the site; if it is right: ssh-keygen -R "
            f"'{self.host.known_as}' -f '{file}'"
        )

    def _ask(self, seen: str, prompts: Prompts) -> None:
        name = self.host.known_as
        if self.host.batch_mode:
            raise UserError(f"{name}: its host key is not known ({seen}), and BatchMode is on")
        fingerprint = seen.split()[-1]
        question = (
            f"The host {name} is not known. It has shown the {seen}.\n"
            "Is that the one that the site has published? (yes/no/[fingerprint]) "
        )
        while True:
            answer = prompts.ask(question).strip()
            if answer == fingerprint or answer.lower() == "yes":
                return
            if answer.lower() == "no":
                raise UserError(f"{name}: its host key was not accepted; nothing was sent to it")
            question = "Type yes, no, or the fingerprint: "

    def _remember(self, kind: str, blob: bytes, say: Callable[[str], None]) -> None:
        name = self.host.known_as
        if not self._file:
            say(f"note: the key of {name} is not kept; UserKnownHostsFile names no file")
            return
        try:
            known_hosts.add(self._file, name, kind, blob, is_hashed=self.host.hash_known_hosts)
        except OSError as error:
            say(f"note: {self._file}: {error.strerror}; the key of {name} is not kept")
            return
        say(f"note: {self._file}: the key of {name} was added")


def checker(host: Host) -> Check:
    """Return the check for a host.

    Raises:
        UserError: a file of known hosts cannot be read.
    """
    files = [*host.user_known_hosts_files, *host.global_known_hosts_files]
    plain = host.hostname.lower()
    portless = plain if host.known_as != plain and not host.host_key_alias else ""
    try:
        return Check(host=host, known=known_hosts.read(files, host.known_as, portless))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; it may revoke keys") from None


def kind_of(algorithm: str) -> str:
    """Return the type of key that a host key algorithm is for."""
    return "ssh-rsa" if algorithm.startswith("rsa-sha2-") else algorithm


def _parse(shown: bytes, host: Host) -> tuple[str, bytes, SSHCertificate | None]:
    """Return the plain key in what the server has shown, and its certificate if it is one."""
    kind = shown[4 : 4 + int.from_bytes(shown[:4], "big")]
    if not kind.endswith(CERTIFICATE.encode()):
        return kind.decode(errors="replace"), shown, None
    try:
        identity = load_ssh_public_identity(kind + b" " + base64.b64encode(shown))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{host.known_as}: its host certificate cannot be read: {error}") from None
    assert isinstance(identity, SSHCertificate)
    plain = kind.decode().removesuffix(CERTIFICATE)
    return plain, _blob(identity.public_key()), identity


def _blob(key: Any) -> bytes:
    line: bytes = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return base64.b64decode(line.split()[1])


def _rsa_bits(blob: bytes) -> int:
    """Return how long the modulus of an RSA key is."""
    at = 0
    # The type and the exponent come before it.
    for _ in range(2):
        at += 4 + int.from_bytes(blob[at : at + 4], "big")
    size = int.from_bytes(blob[at : at + 4], "big")
    return int.from_bytes(blob[at + 4 : at + 4 + size], "big").bit_length()


def _fault(certificate: SSHCertificate, hostname: str, allowed: Sequence[str] | None) -> str:
    """Return what is wrong with a certificate for a host; empty if nothing is."""
    # SHA-1, as old authorities sign with RSA, can be forged; what cannot be told counts as that.
    algorithm = bytes(getattr(certificate, "_inner_sig_type", b"ssh-rsa")).decode(errors="replace")
    if algorithm == "ssh-rsa":
        return "it is signed with SHA-1"
    if allowed is not None and algorithm not in allowed:
        return f"it is signed with {algorithm}, which CASignatureAlgorithms leaves out"
    try:
        certificate.verify_cert_signature()
    except InvalidSignature:
        return "its signature is wrong"
    if certificate.type is not SSHCertificateType.HOST:
        return "it is a user's"
    now = time.time()
    if now < certificate.valid_after:
        return "it is not valid yet"
    if now >= certificate.valid_before:
        return "it has expired"
    if certificate.critical_options:
        return "it has an option that is not known"
    principals = certificate.valid_principals
    if principals and hostname.lower().encode(errors="surrogateescape") not in principals:
        return f"it is not for {hostname}"
    return ""


def _short(kind: str) -> str:
    name = kind.removeprefix("sk-").removeprefix("ssh-").partition("-")[0]
    return name.partition("@")[0].upper()
