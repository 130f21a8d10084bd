"""A command called as a function: its words, environment and folder in, exit code and output out.

To start Python for the command, and again for the training side that it calls, costs a second of
the processor. What a test claims of a process, such as its signals, needs one; the rest does not.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cluster.errors import run_to_exit
from cluster.plan import container
from train.engine import errors as train_errors

Main = Callable[[list[str]], int]


def call(
    main: Main,
    *words: str,
    folder: Path,
    environment: Mapping[str, str],
    capfd: pytest.CaptureFixture[str],
) -> subprocess.CompletedProcess[str]:
    """Call the `main` of a module of cluster/ as its process would."""
    before = Path.cwd()
    os.chdir(folder)
    capfd.readouterr()
    try:
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(sys, "argv", ["command", *words]),
            mock.patch.object(container, "call", _call_training_side),
            _own_signals(),
            pytest.raises(SystemExit) as ended,
        ):
            run_to_exit(main)
    finally:
        os.chdir(before)
    output, errors = capfd.readouterr()
    return subprocess.CompletedProcess(words, int(str(ended.value.code)), output, errors)


def _call_training_side(
    runtime: object,
    module: str,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    **_: Any,
) -> int:
    """Stand in for `container.call`, which starts a process or a container for the module."""
    main = importlib.import_module(module).main
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        mock.patch.object(sys, "argv", [module, *arguments]),
        mock.patch.object(train_errors.os, "_exit", sys.exit),
        pytest.raises(SystemExit) as ended,
    ):
        train_errors.run_to_exit(main)
    return int(str(ended.value.code or 0))


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put back what a command that waits for a run does at signals: here it does not end."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
