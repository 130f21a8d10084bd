"""The user's terminal: raw while a session has it, and given back however the session ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import termios
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

# Indices into what tcgetattr returns.
IFLAG, OFLAG, LFLAG, CC = 0, 1, 3, 6
# What OpenSSH turns off.
RAW_OFF = {
    IFLAG: termios.ISTRIP
    | termios.INLCR
    | termios.IGNCR
    | termios.ICRNL
    | termios.IXON
    | termios.IXANY
    | termios.IXOFF,
    OFLAG: termios.OPOST,
    LFLAG: termios.ISIG
    | termios.ICANON
    | termios.ECHO
    | termios.ECHOE
    | termios.ECHOK
    | termios.ECHONL
    | termios.IEXTEN,
}


@dataclass(frozen=True)
class Size:
    """The size of a terminal, in characters and, where it tells, in pixels."""

    columns: int
    rows: int
    width: int = 0
    height: int = 0


class Terminal:
    """The terminal behind a descriptor; as a context manager it is raw within."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.attributes: list[Any] = termios.tcgetattr(fd)
        """As tcgetattr returned them, before it became raw."""
        self._size = Size(80, 24)
        self.is_raw = False
        """Whether keys come as they are, and a new line does not begin at the left."""

    def __enter__(self) -> Self:
        self.make_raw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def make_raw(self) -> None:
        """Have it pass each byte on as it is."""
        with contextlib.suppress(termios.error):  # it is gone: reading will tell
            self.attributes = termios.tcgetattr(self._fd)
        raw = [*self.attributes[:CC], list(self.attributes[CC])]
        for index, flags in RAW_OFF.items():
            raw[index] &= ~flags
        raw[IFLAG] |= termios.IGNPAR
        raw[CC][termios.VMIN], raw[CC][termios.VTIME] = 1, 0
        self.is_raw = True
        # Not TCSADRAIN: that would wait while the terminal is held by Ctrl+S, and fail at a signal.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self._fd, termios.TCSANOW, raw)

    def restore(self) -> None:
        """Make it as it was before it became raw."""
        if self.is_raw:
            with contextlib.suppress(termios.error):  # it is gone: its window was closed
                termios.tcsetattr(self._fd, termios.TCSANOW, self.attributes)
        self.is_raw = False

    def size(self) -> Size:
        """Return its size now."""
        with contextlib.suppress(OSError):  # it is gone
            rows, columns, width, height = struct.unpack(
                "HHHH", fcntl.ioctl(self._fd, termios.TIOCGWINSZ, bytes(8))
            )
            self._size = Size(columns, rows, width, height)
        return self._size

    def suspend(self) -> None:
        """Give the terminal back and stop, with all of this job; return when it goes on."""
        self.restore()
        before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        # The whole group: make waits for us in it, and the shell for make.
        os.kill(0, signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, before)
        self.make_raw()
