"""The user's terminal: raw while a session has it, and given back however the session ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.login import guardian
from cluster.login.modes import Modes

# Indices into what tcgetattr returns.
IFLAG, OFLAG, CFLAG, LFLAG, CC = 0, 1, 2, 3, 6
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
    """The terminal behind a descriptor; as a context manager it is raw within.

    A process beside this one gives it back where this one cannot, because it was killed.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.attributes: list[Any] = termios.tcgetattr(fd)
        """As tcgetattr returned them, before it became raw."""
        self._size = Size(80, 24)
        self._modes = Modes()
        self._undo = b""
        self._undo_is_left = False
        self.is_raw = False
        """Whether keys come as they are, and a new line does not begin at the left."""
        self._guardian: subprocess.Popen[bytes] | None = None
        # The thread that receives tells of modes, the session of all else.
        self._telling = threading.Lock()

    def __enter__(self) -> Self:
        self._guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(guardian.__file__))],
            stdin=subprocess.PIPE,
            stdout=self._fd,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._guardian.stdin is not None
        # A guardian that was stopped must not stop the session.
        os.set_blocking(self._guardian.stdin.fileno(), False)
        self.make_raw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()
        with self._telling:
            process, self._guardian = self._guardian, None
        assert process is not None and process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            # It goes on where the terminal stands still, and there is something left to show.
            if not self._undo_is_left:
                process.kill()
                process.wait()

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
        self._tell_guardian()
        # Not TCSADRAIN: that would wait while the terminal is held by Ctrl+S, and fail at a signal.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self._fd, termios.TCSANOW, raw)

    def restore(self) -> None:
        """Make it as it was before it became raw."""
        if not self.is_raw:
            return
        with contextlib.suppress(termios.error):  # it is gone: its window was closed
            termios.tcsetattr(self._fd, termios.TCSANOW, self.attributes)
        self.is_raw = False
        self._tell_guardian()

    def size(self) -> Size:
        """Return its size now."""
        with contextlib.suppress(OSError):  # it is gone
            rows, columns, width, height = struct.unpack(
                "HHHH", fcntl.ioctl(self._fd, termios.TIOCGWINSZ, bytes(8))
            )
            self._size = Size(columns, rows, width, height)
            self._modes.rows = rows
        return self._size

    def note(self, data: bytes) -> None:
        """Take note of what it was given to show: the modes that it turns on."""
        if self._modes.feed(data) and (undo := self._modes.undo()) != self._undo:
            self._undo = undo
            self._tell_guardian()

    def reset_modes(self, show: Callable[[bytes], bool]) -> None:
        """Turn off the modes that are left on; what they made it type is dropped.

        `show` writes what it is given, and returns whether all of it is out; if it is not, the
        process beside this one shows it.
        """
        if not self._undo:
            return
        with contextlib.suppress(termios.error):
            termios.tcflush(self._fd, termios.TCIFLUSH)
        if show(self._undo):
            self._undo = b""
            self._modes = Modes()
        else:
            self._undo_is_left = True

    def suspend(self) -> None:
        """Give the terminal back and stop, with all of this job; return when it goes on."""
        self.restore()
        before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        # The whole group: make waits for us in it, and the shell for make.
        os.kill(0, signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, before)
        self.make_raw()

    def _tell_guardian(self) -> None:
        with self._telling:
            if self._guardian is None or self._guardian.stdin is None:
                return
            state = None
            if self.is_raw or self._undo_is_left:
                *flags, characters = self.attributes
                # VMIN and VTIME come as numbers where the terminal was not canonical.
                codes = [bytes((c,)) if isinstance(c, int) else c for c in characters]
                state = [*flags, [code.hex() for code in codes], self._undo.hex()]
            # If it is gone the session goes on without it.
            with contextlib.suppress(OSError):
                os.write(self._guardian.stdin.fileno(), json.dumps(state).encode() + b"\n")
