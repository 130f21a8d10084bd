"""One process of train/tinyllama.py, without a launcher: for what is exact only there, as a kill.

It is forked by the standard library's fork server, which has imported torch and the training side
already. So it is a process of its own that runs the script's own `main`, and the seconds that
imports take are spent once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from tests.conftest import CHECKOUT, LAUNCH_TIMEOUT_S

PRELOADED = ["train.tinyllama", "train.export", "train.engine.checkpoint", "train.engine.model"]
PRELOADED += ["train.engine.metrics", "train.engine.strategy", "train.engine.step"]


class Alone:
    """A process that trains; use it with `with`, at whose end it is killed."""

    def __init__(
        self, arguments: list[str], environment: Mapping[str, str], errors: Path | None = None
    ) -> None:
        """Start it; stderr goes to stdout, or to the file `errors`."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        receiver, sender = Pipe(duplex=False)
        self.process = context.Process(
            target=_train, args=(arguments, dict(environment), sender, errors)
        )
        # The server reads it once, when it imports torch.
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            self.process.start()
        finally:
            del os.environ["OMP_NUM_THREADS"]
            if threads is not None:
                os.environ["OMP_NUM_THREADS"] = threads
        sender.close()
        self.stdout = os.fdopen(os.dup(receiver.fileno()), encoding="utf-8")
        receiver.close()

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.stdout.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait_for(self, text: str) -> None:
        """Read what it prints until a line that holds `text`."""
        seen = []
        for line in self.stdout:
            seen.append(line)
            if text in line:
                return
        raise AssertionError(f"'{text}' never came: {''.join(seen)}")

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its exit code and the rest of what it printed."""
        output = self.stdout.read()
        self.process.join(LAUNCH_TIMEOUT_S)
        assert self.process.exitcode is not None, f"it hangs after: {output}"
        return self.process.exitcode, output


def train(
    arguments: list[str], environment: Mapping[str, str], errors: Path
) -> subprocess.CompletedProcess[str]:
    """Train to the end; stderr goes through the file `errors`."""
    with Alone(arguments, environment, errors) as process:
        code, output = process.end()
    return subprocess.CompletedProcess(arguments, code, output, errors.read_text())


def _train(
    arguments: list[str], environment: dict[str, str], output: Connection, errors: Path | None
) -> None:
    from train import tinyllama
    from train.engine.errors import run_to_exit

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(CHECKOUT)
    # The fork server ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output.fileno(), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if errors else 1, 2)
    output.close()
    sys.argv[1:] = arguments
    run_to_exit(tinyllama.SCRIPT.main)
