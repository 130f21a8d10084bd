"""The client as a function of this process, with pipes for 0, 1 and 2: it costs no start."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from cluster.errors import run_to_exit
from cluster.login.__main__ import main
from tests.real.cluster.login.screen import environment
from tests.real.cluster.login.server import Server
from tests.waiting import wait_until

Result = subprocess.CompletedProcess[bytes]


class Pipe:
    """One of the three, and the test's side of it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved = os.dup(fd)
        reading, writing = os.pipe()
        theirs, self._ours = (reading, writing) if fd == 0 else (writing, reading)
        os.dup2(theirs, fd)
        os.close(theirs)
        self.data = b""
        """What was read of it."""
        self.failure: BaseException | None = None
        self._is_open = True
        self._threads: list[threading.Thread] = []

    def in_background(self, *targets: Callable[[], None]) -> None:
        """Have threads do something with it; each has to end when its other side is closed."""
        for target in targets:
            self._threads.append(threading.Thread(target=self._do, args=(target,), daemon=True))
            self._threads[-1].start()

    def _do(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            self.failure = error
            # The session ends, and the test with it.
            if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                os.kill(os.getpid(), signal.SIGTERM)

    def feed(self, data: bytes) -> None:
        """Write `data` and close it; whoever reads may leave before that."""
        left = memoryview(data)
        with contextlib.suppress(BrokenPipeError):
            while left:
                left = left[os.write(self._ours, left) :]
        self.leave()

    def take(self) -> None:
        """Read to the end."""
        while data := os.read(self._ours, 1 << 16):
            self.data += data

    def take_some(self) -> None:
        """Read what is there first, and leave."""
        self.data = os.read(self._ours, 1 << 16)
        self.leave()

    def leave_when_full(self) -> None:
        """Read nothing, and leave when there is no room any more."""
        wait_until(self.is_full, "the pipe to be full", every_s=0.01)
        self.leave()

    def leave(self) -> None:
        """Close this side."""
        if self._is_open:
            self._is_open = False
            os.close(self._ours)

    def is_full(self) -> bool:
        """Whether there is no room for more."""
        writing = self._ours if self._fd == 0 else self._fd
        return not select.select([], [writing], [], 0)[1]

    def restore(self) -> None:
        """Let the descriptor be again what it was."""
        os.dup2(self._saved, self._fd)
        os.close(self._saved)
        for thread in self._threads:
            thread.join()
        self.leave()


@contextlib.contextmanager
def standard_pipes() -> Iterator[tuple[Pipe, Pipe, Pipe]]:
    """Have pipes for standard input, output and errors within."""
    sys.stdout.flush()
    sys.stderr.flush()
    pipes = Pipe(0), Pipe(1), Pipe(2)
    try:
        with (
            open(1, "w", closefd=False) as out,
            open(2, "w", buffering=1, closefd=False) as errors,
            mock.patch.multiple(sys, stdout=out, stderr=errors),
        ):
            yield pipes
    finally:
        for pipe in pipes:
            pipe.restore()
    for pipe in pipes:
        if pipe.failure is not None:
            raise pipe.failure


def exit_code(server: Server, *words: str, config: Path | None = None, **variables: str) -> int:
    """Return the exit code of `python -m cluster.login WORDS...` with the streams as they are."""
    with (
        mock.patch.dict(os.environ, environment(server, config, **variables), clear=True),
        mock.patch.object(sys, "argv", ["cluster.login", *words]),
    ):
        try:
            run_to_exit(main)
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            return ended.code
    raise AssertionError("it does not exit")


def client(
    server: Server, command: str, *options: str, given: bytes = b"", **variables: str
) -> Result:
    """Run a command there, or a shell if it is empty, with `given` as its input."""
    words = [*options, *(["--command", command] if command else [])]
    with standard_pipes() as (given_pipe, out, errors):
        given_pipe.in_background(lambda: given_pipe.feed(given))
        out.in_background(out.take)
        errors.in_background(errors.take)
        code = exit_code(server, *words, **variables)
    return Result(words, code, out.data, errors.data)


def when_heeded(number: signal.Signals) -> Callable[[], None]:
    """Return a function that sends this process a signal as soon as a session heeds it."""
    before = signal.getsignal(number)

    def send() -> None:
        wait_until(lambda: signal.getsignal(number) is not before, "the handler", every_s=0.01)
        os.kill(os.getpid(), number)

    return send
