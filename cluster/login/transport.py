"""The way to a login node from a laptop: commands over one connection, with one sign-in.

A script runs in a clean shell there (cluster/clean_shell.py). All that is wanted of the far side is
sshd, bash and the usual small commands; no SFTP, which some sites have switched off.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

# As ssh has it; a command's own 255 cannot be told from it.
LOST = 255
OPENSSH = 'set backend = "openssh" in [ssh] of site.toml, which takes the ssh command'


def to_stderr(text: str) -> None:
    """Show what the user should know: a banner, a note."""
    print(text, file=sys.stderr, flush=True)


class Running(Protocol):
    """A script that runs there beside others, and ends at the latest with the connection."""

    def read_line(self) -> str:
        """Return the next line that it prints; an empty text when there are no more."""

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
        """Why there is no connection any more; empty as long as there is."""

    def __enter__(self) -> Transport: ...
    def __exit__(self, *_: object) -> None: ...

    def ask(self, script: str, data: bytes = b"") -> bytes:
        """Run a bash script with `data` as its standard input; return what it prints.

        Raises:
            UserError: it failed, with the last line that it said; or the connection was lost.
        """

    def run(self, script: str, modules: Sequence[str] = ()) -> int:
        """Run a bash script with this terminal, or these streams; return its exit code.

        `modules` are loaded before, in the login shell; one that is not there is said: 2.
        Without a terminal it has no input. 255: the connection was lost, and that was said.
        """

    def start(self, script: str, modules: Sequence[str] = ()) -> Running:
        """Start a bash script whose standard input stays open until `end`."""

    def dial(self, host: str, port: int) -> Stream:
        """Return a stream to a port as the login node sees it.

        Where nothing listens, or sshd allows it not, that is a `UserError`, or is said later.
        """
