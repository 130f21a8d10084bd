"""Where output goes: written where there is room, kept where there is none, never waited for.

The thread that receives writes, so that an echoed key takes no detour; what a slow reader leaves
over the session's loop writes later. What is kept is bounded by the channel's window: only what was
written is reported to the server as taken.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable

# POSIX promises that so much goes into a pipe that select calls writable.
ALWAYS_FITS = select.PIPE_BUF
# The most that one write takes; what a terminal is given at once, Ctrl+C can no longer stop.
LARGEST_WRITE = 1 << 18


class Outlet:
    """A descriptor that is written to without ever waiting; for two threads."""

    def __init__(self, fd: int, seen: Callable[[bytes], None] | None = None) -> None:
        """Take `fd`, which stays open; `seen` is told each piece that was written."""
        self._seen = seen
        self._lock = threading.Lock()
        self._kept: deque[bytes] = deque()
        self._is_stopped = False
        self._is_held = False
        self._own_fd: int | None = None
        self._socket: socket.socket | None = None
        self.fd = fd
        """What to wait for until there is room."""
        self.broken: OSError | None = None
        """Why nothing can be written any more."""
        mode = os.fstat(fd).st_mode
        self._blocks = stat.S_ISFIFO(mode) or os.isatty(fd)
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(fd))
        elif self._blocks:
            self._own_fd = _reopened(fd)
            self.fd = fd if self._own_fd is None else self._own_fd

    def close(self) -> None:
        """Close what was opened beside the given descriptor."""
        with self._lock:
            if self._own_fd is not None:
                os.close(self._own_fd)
            if self._socket is not None:
                self._socket.close()
            self._own_fd, self._socket = None, None
            self.broken = self.broken or OSError("closed")

    @property
    def is_waiting(self) -> bool:
        """Whether something is kept until there is room."""
        return bool(self._kept) and self.broken is None

    def put(self, data: bytes) -> int:
        """Write `data`, or keep what finds no room; return how many bytes are done with.

        Where nothing can be written any more, all are.
        """
        with self._lock:
            if self._is_stopped:
                return len(data)
            if self._kept or self._is_held:
                self._kept.append(data)
                return 0
            written = self._write_all(data)
            if self.broken is not None:
                return len(data)
            if written < len(data):
                self._kept.append(data[written:])
            return written

    def flush(self) -> int:
        """Write what was kept as far as there is room; return how many bytes are done with.

        Where nothing can be written any more, all are: what is left unsaid, the server would wait
        for to be taken.
        """
        total = 0
        with self._lock:
            while self._kept:
                data = self._kept.popleft()
                written = self._write_all(data)
                if self.broken is not None:
                    written = len(data)
                total += written
                if written < len(data):
                    self._kept.appendleft(data[written:])
                    break
        return total

    def hold(self) -> None:
        """Keep all that `put` is given, until `release`."""
        with self._lock:
            self._is_held = True

    def release(self) -> None:
        """Let what was kept be written, by `flush`, and then what comes."""
        with self._lock:
            self._is_held = False

    def stop(self) -> None:
        """Drop what is kept, and all that `put` is given from now on."""
        with self._lock:
            self._is_stopped = True
            self._kept.clear()

    def finish(self, data: bytes, timeout_s: float) -> bool:
        """Stop, and write `data` as the last; return whether it found room within `timeout_s`."""
        self.stop()
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while True:
                data = data[self._write_all(data) :]
                left = deadline - time.monotonic()
                if not data or self.broken is not None or left <= 0:
                    return not data
                select.select([], [self.fd], [], left)

    def _write_all(self, data: bytes) -> int:
        total = 0
        while total < len(data) and self.broken is None:
            written = self._write(data[total : total + LARGEST_WRITE] if total else data)
            if not written:
                break
            total += written
        if total and self._seen is not None:
            self._seen(data[:total])
        return total

    def _write(self, data: bytes) -> int:
        """Write some of `data`; return 0 where there is no room."""
        data = data[:LARGEST_WRITE]
        try:
            if self._socket is not None:
                return self._socket.send(data, socket.MSG_DONTWAIT)
            if self._blocks and self._own_fd is None:
                if not select.select([], [self.fd], [], 0)[1]:
                    return 0
                data = data[:ALWAYS_FITS]
            return os.write(self.fd, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.broken = error
            return 0


def _reopened(fd: int) -> int | None:
    """Return a descriptor of our own for a pipe or a terminal, which does not block.

    O_NONBLOCK on the given one would also hold for make and the shell. Without one of our own, a
    terminal that stands still holds us up.
    """
    for find in (_name, _controlling_terminal):
        with contextlib.suppress(OSError):
            return os.open(find(fd), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return None


def _name(fd: int) -> str:
    return os.ttyname(fd) if os.isatty(fd) else f"/proc/self/fd/{fd}"


def _controlling_terminal(fd: int) -> str:
    """Return the name of our terminal, which after `su` belongs to somebody else by its own."""
    os.tcgetpgrp(fd)  # fails if it is another
    return "/dev/tty"
