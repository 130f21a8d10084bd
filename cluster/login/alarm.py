"""Signals: those that end this process cleanly, and those that wake a session's loop."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


def leave_on_signals() -> None:
    """Have the signals that end a process raise SystemExit, as Ctrl+C raises KeyboardInterrupt.

    So all is cleaned up on the way out: a terminal that does not echo, a folder, a connection.
    """
    for number in ENDING:
        # What a parent has ignored, as nohup does, stays ignored.
        if number != signal.SIGINT and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    # Nothing may interrupt the cleanup on the way out.
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


class Alarm:
    """Wakes the loop: for a signal, or for another thread."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)

    def close(self) -> None:
        """Close it; ringing it afterwards has no effect."""
        self._ours.close()
        self._theirs.close()

    def fileno(self) -> int:
        """Return the descriptor for select."""
        return self._ours.fileno()

    def ring(self) -> None:
        """Wake the loop."""
        with contextlib.suppress(OSError):  # full, or closed
            self._theirs.send(b"\0")  # no signal has this number

    def take(self) -> list[int]:
        """Return the signals that arrived."""
        return [number for number in self._ours.recv(4096) if number]

    @contextlib.contextmanager
    def watches(self, *, resize: bool) -> Iterator[list[int]]:
        """Have signals wake the loop; yields a list for the one that ends the session."""
        numbers = [*ENDING, *([signal.SIGWINCH] if resize else [])]
        before: dict[int, Any] = {}
        descriptor = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        try:
            for number in numbers:
                # What a parent has ignored, as nohup does, stays ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, _heard)
            yield []
        finally:
            for restored, handler in before.items():
                signal.signal(restored, handler)
            signal.set_wakeup_fd(descriptor)


def _heard(number: int, frame: FrameType | None) -> None:
    """The number is in the pipe already; nothing is done in a handler."""
