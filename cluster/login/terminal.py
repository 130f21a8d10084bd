"""The user's terminal: raw while a session has it, and given back however the session ends."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import tty
from typing import Any, Self


class Terminal:
    """The terminal behind a descriptor; as a context manager it is raw within."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.attributes: list[Any] = termios.tcgetattr(fd)
        """As tcgetattr returned them, before it became raw."""
        self._size = os.terminal_size((80, 24))
        self.is_raw = False
        """Whether keys come as they are, and a new line does not begin at the left."""

    def __enter__(self) -> Self:
        self.make_raw()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def make_raw(self) -> None:
        """Have it pass each byte on as it is."""
        self.is_raw = True
        with contextlib.suppress(termios.error):  # it is gone: reading will tell
            self.attributes = termios.tcgetattr(self._fd)
            # At once: else it would wait while the terminal is held by Ctrl+S.
            tty.setraw(self._fd, termios.TCSANOW)

    def restore(self) -> None:
        """Make it as it was before it became raw."""
        if self.is_raw:
            with contextlib.suppress(termios.error):  # it is gone: its window was closed
                termios.tcsetattr(self._fd, termios.TCSANOW, self.attributes)
        self.is_raw = False

    def size(self) -> os.terminal_size:
        """Return its size now, in characters."""
        with contextlib.suppress(OSError):  # it is gone
            self._size = os.get_terminal_size(self._fd)
        return self._size

    def suspend(self) -> None:
        """Give the terminal back and stop, with all of this job; return when it goes on."""
        self.restore()
        before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        # The whole group: make waits for us in it, and the shell for make.
        os.kill(0, signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, before)
        self.make_raw()
