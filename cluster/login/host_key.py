"""Is this server the one that is known? Checked before anything secret is sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import paramiko

from cluster.login import known_hosts
from cluster.login.config import Host
from cluster.login.known_hosts import Entry
from cluster.login.prompts import Prompts
from cluster.login.transport import OPENSSH
from runfolder.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is known about a host, to compare its key with."""

    host: Host
    keys: list[Entry]
    portless: list[Entry]
    """For its name without the port, which ssh uses only if `keys` has none."""
    marked: list[Entry]
    """Revoked keys, and certificate authorities."""

    @classmethod
    def of(cls, host: Host) -> Check:
        """Return the check for a host; a `UserError` if a file cannot be read."""
        files = host.user_known_hosts_files + host.global_known_hosts_files
        named = known_hosts.find(files, host.known_as)
        plain = host.hostname.lower()
        # Another server on the same machine may have the key of the name without the port.
        has_portless = plain != host.known_as and not host.host_key_alias
        portless = known_hosts.find(files, plain) if has_portless else []
        return cls(
            host=host,
            keys=[entry for entry in named if not entry.marker],
            portless=[entry for entry in portless if not entry.marker],
            marked=[entry for entry in named + portless if entry.marker],
        )

    def preferred(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return host key algorithms, those of known keys first."""
        kinds = {entry.kind for entry in self.keys or self.portless}
        # An RSA key signs in two ways.
        kinds |= {"rsa-sha2-512", "rsa-sha2-256"} if "ssh-rsa" in kinds else set()
        return tuple(sorted(names, key=lambda name: name not in kinds))

    def check(self, key: paramiko.PKey, prompts: Prompts, say: Callable[[str], None]) -> None:
        """Return if the server's key is to be trusted, or raise a `UserError`."""
        name = self.host.known_as
        for entry in self.marked:
            if entry.marker == "REVOKED" and entry.blob == key.asbytes():
                raise UserError(
                    f"{name}: its host key is revoked ({entry.where}); the server may be "
                    "using a stolen key. Ask the site"
                )
        least = self.host.required_rsa_size
        if key.get_name() == "ssh-rsa" and key.get_bits() < least:
            raise UserError(
                f"{name}: its RSA host key has {key.get_bits()} bits, and RequiredRSASize "
                f"is {least}; ask the site for a longer one"
            )
        if any(entry.blob == key.asbytes() for entry in self.keys or self.portless):
            return
        seen = f"{key.algorithm_name} key {key.fingerprint}"
        if self.keys:
            raise self._changed(seen, key.get_name())
        for entry in self.marked:
            if entry.marker == "CA":
                raise UserError(
                    f"{name}: its host key ({seen}) is not known, and host certificates "
                    f"({entry.where}) are not supported; {OPENSSH}"
                )
        if self.host.strict_host_key_checking == "yes":
            raise UserError(
                f"{name}: its host key is not known ({seen}), and StrictHostKeyChecking is on; "
                f"add the site's line to {self._file or 'known_hosts'}"
            )
        if self.host.strict_host_key_checking == "ask":
            self._ask(seen, key.fingerprint, prompts)
        self._remember(key, say)

    @property
    def _file(self) -> str:
        return next(iter(self.host.user_known_hosts_files), "")

    def _changed(self, seen: str, kind: str) -> UserError:
        same = [entry for entry in self.keys if entry.kind == kind]
        entry = (same or self.keys)[0]
        what = f"its host key is not the one in {entry.where}"
        if not same:
            what = f"it offered no host key of a known type ({entry.where})"
        file = entry.where.rpartition(":")[0] or entry.where
        return UserError(
            f"{self.host.known_as}: {what} but {seen}; someone may be eavesdropping, or the host "
            f"key was changed. Ask the site; if it is right: ssh-keygen -R "
            f"'{self.host.known_as}' -f '{file}'"
        )

    def _ask(self, seen: str, fingerprint: str, prompts: Prompts) -> None:
        name = self.host.known_as
        if self.host.batch_mode:
            raise UserError(f"{name}: its host key is not known ({seen}), and BatchMode is on")
        question = (
            f"The host {name} is not known. It has the {seen}.\n"
            "Is that the one that the site has published? (yes/no/[fingerprint]) "
        )
        while True:
            answer = prompts.ask(question).strip()
            if answer == fingerprint or answer.lower() == "yes":
                return
            if answer.lower() == "no":
                raise UserError(f"{name}: its host key was not accepted; nothing was sent to it")
            question = "Type yes, no, or the fingerprint: "

    def _remember(self, key: paramiko.PKey, say: Callable[[str], None]) -> None:
        name = self.host.known_as
        if not self._file:
            say(f"note: the key of {name} is not saved; UserKnownHostsFile names no file")
            return
        done = "was added"
        try:
            known_hosts.add(self._file, name, key, is_hashed=self.host.hash_known_hosts)
        except OSError as error:
            done = f"is not saved: {error.strerror}"
        say(f"note: {self._file}: the key of {name} {done}")
