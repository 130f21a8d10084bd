"""What stands for something else in ssh_config's values: %h, ~ and ${NAME}."""

from __future__ import annotations

import os
import pwd
import re
import socket
from collections.abc import Mapping

from runfolder.errors import UserError


def of(
    *, alias: str, hostname: str, port: int, user: str, key_alias: str, jump: str
) -> dict[str, str]:
    """Return the tokens of a host, by their letter (man ssh_config, TOKENS).

    %C is left out: what it is the hash of has changed between releases of OpenSSH.
    """
    here = pwd.getpwuid(os.getuid())
    name = socket.gethostname()
    return {
        "%": "%",
        "d": here.pw_dir,
        "h": hostname,
        "i": str(here.pw_uid),
        "j": jump,
        "k": key_alias or alias,
        "L": name.partition(".")[0],
        "l": name,
        "n": alias,
        "p": str(port),
        "r": user,
        "u": here.pw_name,
    }


def expand(value: str, tokens: Mapping[str, str]) -> str:
    """Return `value` with its tokens replaced.

    Raises:
        UserError: one of them is none that we know.
    """

    def meaning(found: re.Match[str]) -> str:
        if found[1] not in tokens:
            raise UserError(f"ssh_config: '{value}': %{found[1]} is not supported; write it out")
        return tokens[found[1]]

    return re.sub(r"%(.?)", meaning, value, flags=re.DOTALL)


def path(value: str, tokens: Mapping[str, str]) -> str:
    """Return the path that `value` stands for: ~, ${NAME} and tokens are replaced.

    Raises:
        UserError: a variable is not set, or a token is none that we know.
    """

    def variable(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise UserError(f"ssh_config: '{value}': {found[1]} is not set in the environment")
        return os.environ[found[1]]

    return expand(re.sub(r"\$\{(\w+)\}", variable, home(value)), tokens)


def home(value: str) -> str:
    """Return `value` with a ~ at its start replaced as ssh does: by the account, not by $HOME."""
    found = re.match(r"~([^/]*)", value)
    if found is None:
        return value
    try:
        account = pwd.getpwnam(found[1]) if found[1] else pwd.getpwuid(os.getuid())
    except KeyError:
        raise UserError(f"ssh_config: '{value}': there is no user {found[1]}") from None
    return account.pw_dir + value[found.end() :]
