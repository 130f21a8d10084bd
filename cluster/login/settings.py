"""Settings of ssh_config as `ssh -G` prints them, read by type."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence

from runfolder.errors import UserError, printable

Settings = dict[str, list[str]]
"""Keywords in lower case, each with its values in order."""
# `Match exec` and the canonicalization of host names may use the network.
TIMEOUT_S = 60


def by_ssh(options: Sequence[str], alias: str, *command: str) -> Settings:
    """Return what `ssh -G` says about a host, or raise a `UserError`; a command may be given."""
    try:
        done = subprocess.run(
            ["ssh", *options, "-T", "-G", "--", alias, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            # A file's name may be any bytes.
            errors="surrogateescape",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"ssh -G {alias} did not finish in {TIMEOUT_S} s; a Match exec in ssh_config may hang"
        ) from None
    if done.returncode != 0:
        said = done.stderr.strip().partition("\n")[0] or f"exit code {done.returncode}"
        raise UserError(f"ssh -G {alias}: {said.strip()}; fix ssh_config")
    found: Settings = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key, []).append(value)
    return found


class Values:
    """The settings of one host."""

    def __init__(self, alias: str, settings: Settings) -> None:
        self._alias = alias
        self._settings = settings
        self.tokens: dict[str, str] = {}
        """What %h and the like stand for (man ssh_config, TOKENS)."""

    def one(self, key: str, default: str = "") -> str:
        """Return a value; "none" counts as the default."""
        value = self._settings.get(key, [default])[0]
        return default if value.lower() == "none" else value

    def all(self, key: str, default: Sequence[str] = ()) -> list[str]:
        """Return the values of all lines of a keyword."""
        return [value for value in self._settings.get(key, default) if value.lower() != "none"]

    def is_on(self, key: str, default: str = "no") -> bool:
        """Return whether a setting is set and not off."""
        return self.one(key, default).lower() not in ("no", "false")

    def number(self, key: str, default: int) -> int:
        """Return a number, or raise a `UserError`."""
        value = self.one(key, str(default))
        if not value.isdecimal():
            raise self.wrong(key, value, "is not a number")
        return int(value)

    def files(self, key: str, default: str) -> tuple[str, ...]:
        """Return the files of a line, from which `ssh -G` has removed the quotes."""
        names = self._settings.get(key, [default])[0].split()
        names = [self.path(name) for name in names if name.lower() != "none"]
        if relative := [name for name in names if not name.startswith("/")]:
            raise self.wrong(key, relative[0], "use a path without spaces that starts with / or ~")
        return tuple(names)

    def agent(self) -> str:
        """Return the socket of the agent; a variable that holds it may be unset."""
        value = self._settings.get("identityagent", ["SSH_AUTH_SOCK"])[0]
        if value == "SSH_AUTH_SOCK" or re.fullmatch(r"\$\w+", value):
            return os.environ.get(value.removeprefix("$"), "")
        return "" if value.lower() == "none" else self.path(value)

    def path(self, value: str) -> str:
        """Return a path with ~, ${NAME} and tokens replaced."""
        if value.startswith("~/"):
            # From the account, as ssh does, not from $HOME.
            value = f"%d{value[1:]}"
        return self.expand(
            re.sub(r"\$\{(\w+)\}", lambda name: os.environ.get(name[1], name[0]), value)
        )

    def expand(self, value: str) -> str:
        """Return `value` with its tokens replaced, or raise a `UserError`."""

        def meaning(found: re.Match[str]) -> str:
            if found[1] not in self.tokens:
                raise self.wrong(value, found[0], "is not supported; write it out")
            return self.tokens[found[1]]

        return re.sub(r"%(.?)", meaning, value, flags=re.DOTALL)

    def wrong(self, key: str, value: str, why: str) -> UserError:
        """Return the error for a value that cannot be used."""
        return UserError(f"ssh_config for {self._alias}: {key} {printable(value)}: {why}")
