"""From a laptop to a login node: commands over one connection, with one sign-in.

A script runs in a clean shell there (cluster/clean_shell.py). The remote side needs only sshd, bash
and the usual small commands; not SFTP, which some sites have disabled.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

# As with ssh; it cannot be told from a command's own 255.
LOST = 255
OPENSSH = 'set backend = "openssh" in [ssh] of site.toml, which uses the ssh command'


def to_stderr(text: str) -> None:
    """Show what the user should know: a banner, a note."""
    print(text, file=sys.stderr, flush=True)


class Running(Protocol):
    """A script that runs there beside others, and ends at the latest with the connection."""

    def read_line(self) -> str:
        """Return the next line that it prints; an empty string when there are no more."""

    def is_over(self) -> bool:
        """Return whether it has ended."""

    def end(self) -> None:
        """Close its standard input, and wait until it has ended."""


class Stream(Protocol):
    """What a socket and a channel have in common."""

    def recv(self, size: int, /) -> bytes: ...
    def sendall(self, data: bytes, /) -> None: ...
    def shutdown(self, how: int, /) -> None: ...
    def close(self) -> None: ...


class Transport(Protocol):
    """A connection to the login node."""

    @property
    def lost(self) -> str:
        """Why the connection is gone; empty as long as it is up."""

    def __enter__(self) -> Transport: ...
    def __exit__(self, *_: object) -> None: ...

    def ask(self, script: str, data: bytes = b"") -> bytes:
        """Run a bash script with `data` as its standard input; return what it prints.

        Raises:
            UserError: it failed, with its last line of output; or the connection was lost.
        """

    def run(self, script: str, modules: Sequence[str] = ()) -> int:
        """Run a bash script with this terminal, or these streams; return its exit code.

        `modules` are loaded first, in the login shell; one that is missing is reported: 2.
        Without a terminal it has no input. 255: the connection was lost, which was reported.
        """

    def start(self, script: str, modules: Sequence[str] = ()) -> Running:
        """Start a bash script whose standard input stays open until `end`."""

    def dial(self, host: str, port: int) -> Stream:
        """Return a stream to a port as the login node sees it.

        If nothing listens, or sshd does not allow it, that is a `UserError`, or is reported later.
        """
