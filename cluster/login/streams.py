"""The streams of a remote program, each moved by a thread of its own.

The session's loop waits for none of them, so ~. and signals work even if the terminal is stopped or
the server accepts nothing. What was not written yet stays in the channel, and is limited by its
window.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
from collections.abc import Callable

import paramiko

from cluster.login.link import BROKEN

BLOCK_BYTES = 1 << 18
# How much may wait to be sent before reading stops: ~. is seen even if the server accepts nothing.
PENDING_BYTES = 1 << 20


class Streams:
    """Standard input, output and errors of a session's channel."""

    def __init__(self, channel: paramiko.Channel, wake: Callable[[], None]) -> None:
        """Prepare; `wake` is called, by other threads, when something has changed."""
        self._channel = channel
        self._wake = wake
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Each is updated by only one thread.
        self._given_bytes = self._sent_bytes = 0
        self._is_stopped = False
        self.is_over = False
        """The program has ended, and all its output is written."""
        self.is_broken = False
        """Nobody reads standard output any more."""
        self.has_drawn = False
        """There were control sequences in its output."""

    def start(self) -> None:
        """Start moving output and input."""
        for target in (self._send_all, self._follow):
            threading.Thread(target=target, daemon=True).start()

    def stop(self) -> None:
        """Drop further output."""
        self._is_stopped = True

    @property
    def has_room(self) -> bool:
        """Whether more input should be read."""
        return self._given_bytes - self._sent_bytes < PENDING_BYTES

    def send(self, data: bytes) -> None:
        """Queue `data` for sending."""

        def job() -> None:
            self._channel.sendall(data)
            was_full = not self.has_room
            self._sent_bytes += len(data)
            if was_full:
                self._wake()

        self._given_bytes += len(data)
        self._jobs.put(job)

    def send_eof(self) -> None:
        """Close its input after what is still to be sent."""
        self._jobs.put(self._channel.shutdown_write)

    def resize(self, size: os.terminal_size) -> None:
        """Resize its terminal."""

        def job() -> None:
            # A program that has closed its output cannot be told, and has nothing to draw.
            with contextlib.suppress(paramiko.SSHException):
                self._channel.resize_pty(*size)

        self._jobs.put(job)

    def close(self) -> None:
        """Close the channel, without waiting, because the other side may be dead."""
        self._jobs.put(self._channel.close)
        self._jobs.put(None)

    def _send_all(self) -> None:
        # The receiving thread notices a broken link; a program that has ended needs no more input.
        with contextlib.suppress(*BROKEN):
            while job := self._jobs.get():
                job()

    def _follow(self) -> None:
        errors = threading.Thread(
            target=self._write, args=(self._channel.recv_stderr, 2), daemon=True
        )
        errors.start()
        self._write(self._channel.recv, 1)
        errors.join()
        # Or until the connection is gone.
        self._channel.recv_exit_status()
        self.is_over = True
        self._wake()

    def _write(self, receive: Callable[[int], bytes], fd: int) -> None:
        has_reader = True
        with contextlib.suppress(*BROKEN):
            while data := receive(BLOCK_BYTES):
                if self._is_stopped or not has_reader:
                    continue
                self.has_drawn = self.has_drawn or b"\x1b" in data
                try:
                    _write_all(fd, data)
                except OSError:
                    has_reader = False
                    if fd == 1:
                        self.is_broken = True
                        self._wake()


def _write_all(fd: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            # A process that shares the descriptor has made it non-blocking.
            select.select([], [fd], [])
