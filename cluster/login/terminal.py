"""The user's terminal: raw while a session has it, and given back however the session ends."""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from collections.abc import Iterator


@contextlib.contextmanager
def raw(fd: int) -> Iterator[None]:
    """Have a terminal pass each byte on as it is, within; then it is as it was."""
    before = termios.tcgetattr(fd)
    # At once: else it would wait while the terminal is held by Ctrl+S. One that is gone, as its
    # window was closed, is no error: reading will tell.
    try:
        with contextlib.suppress(termios.error):
            tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSANOW, before)


def size(fd: int) -> os.terminal_size:
    """Return a terminal's size now, in characters; a usual one where it is gone."""
    with contextlib.suppress(OSError):
        return os.get_terminal_size(fd)
    return os.terminal_size((80, 24))
