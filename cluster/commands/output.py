"""Run a command, and show and log its output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ERROR = b"error: "


def run_logged(command: Sequence[str | Path], environment: Mapping[str, str], log: Path) -> int:
    """Run a command, show and log its output; return its exit code, as a shell reports it.

    Signals are passed on, not acted on: the processes save first, and this waits for them.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

        def pass_on(number: int, _: Any) -> None:
            # Ctrl+C and a closed terminal reach the whole foreground group by themselves.
            if number not in (signal.SIGINT, signal.SIGHUP):
                process.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, pass_on)
        assert process.stdout is not None and process.stderr is not None
        copies = [
            threading.Thread(target=copy, args=(process.stdout, sys.stdout.buffer, stream)),
            threading.Thread(target=copy, args=(process.stderr, sys.stderr.buffer, stream)),
        ]
        for thread in copies:
            thread.start()
        for thread in copies:
            thread.join()
        code = process.wait()
        return code if code >= 0 else 128 - code


def copy(source: IO[bytes], *targets: IO[bytes]) -> None:
    """Copy a process's output as it arrives; an error line that several ranks print, only once.

    A target that fails (its reader is gone, the disk is full) is dropped from then on: the process
    must not block because nobody reads its output.
    """
    taking = list(targets)
    said: set[bytes] = set()
    rest = b""
    while data := os.read(source.fileno(), 65536):
        *lines, rest = (rest + data).split(b"\n")
        ready = b"".join(line + b"\n" for line in lines if _is_new(line, said))
        # What may become an error line waits for its newline; a progress bar has none.
        if not rest.startswith(ERROR) and not ERROR.startswith(rest):
            ready, rest = ready + rest, b""
        _write(ready, taking)
    if rest and _is_new(rest, said):
        _write(rest, taking)


def _is_new(line: bytes, said: set[bytes]) -> bool:
    if line in said:
        return False
    if line.startswith(ERROR):
        said.add(line)
    return True


def _write(data: bytes, targets: list[IO[bytes]]) -> None:
    for target in list(targets):
        try:
            target.write(data)
            target.flush()
        except OSError:
            targets.remove(target)
