"""The user's terminal: raw during a session, and restored however the session ends."""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from collections.abc import Iterator


@contextlib.contextmanager
def raw(fd: int) -> Iterator[None]:
    """Put a terminal in raw mode, and restore it afterwards."""
    before = termios.tcgetattr(fd)
    # At once: otherwise it would wait while Ctrl+S holds the terminal. A terminal that is gone,
    # because its window was closed, is not an error here: reading will show it.
    try:
        with contextlib.suppress(termios.error):
            tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSANOW, before)


def size(fd: int) -> os.terminal_size:
    """Return a terminal's size now, in characters; a usual one if it is gone."""
    with contextlib.suppress(OSError):
        return os.get_terminal_size(fd)
    return os.terminal_size((80, 24))
