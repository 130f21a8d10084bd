"""output.py: a process's bytes shown as they come and logged, its errors once, its signals."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.commands.output import copy, run_logged
from tests.waiting import wait_until

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def copied(*chunks: bytes) -> bytes:
    """Return what `copy` makes of writes that come one after the other."""
    reading, writing = os.pipe()
    shown, logged = io.BytesIO(), io.BytesIO()
    with os.fdopen(reading, "rb") as source:
        thread = threading.Thread(target=copy, args=(source, shown, logged))
        thread.start()
        for chunk in chunks:
            os.write(writing, chunk)
        os.close(writing)
        thread.join()
    assert shown.getvalue() == logged.getvalue()
    return shown.getvalue()


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=20))
@settings(max_examples=50)
def test_what_is_no_error_is_copied_byte_for_byte(chunks: list[bytes]) -> None:
    if b"error: " not in b"".join(chunks):
        assert copied(*chunks) == b"".join(chunks)


output = b"one\nerror: x\nerror: y\nerror: x\nValueError: x\nerror: x\ntwo\nerror: y"
once = b"one\nerror: x\nerror: y\nValueError: x\ntwo\n"


@given(st.lists(st.integers(0, len(output)), max_size=6))
@settings(max_examples=50)
def test_an_error_that_was_said_is_not_said_again_however_the_bytes_come(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(output)]
    assert copied(*(output[a:b] for a, b in pairwise(places) if a < b)) == once


def test_a_progress_bar_is_shown_before_its_line_ends() -> None:
    reading, writing = os.pipe()
    shown = io.BytesIO()
    with os.fdopen(reading, "rb") as source:
        thread = threading.Thread(target=copy, args=(source, shown))
        thread.start()
        for so_far in (b"\r 10%", b"\r 10%\r 20%", b"\r 10%\r 20% eta", b"\r 10%\r 20% eta\r"):
            os.write(writing, so_far.removeprefix(shown.getvalue()))
            wait_until(partial(_shows, shown, so_far), "the bar shown as it is", every_s=0.002)
        os.close(writing)
        thread.join()


def _shows(shown: io.BytesIO, text: bytes) -> bool:
    return shown.getvalue() == text


class Broken(io.BytesIO):
    """Takes nothing: a pipe whose reader has left, or a file on a full disk."""

    def write(self, data: object) -> int:
        raise BrokenPipeError


def test_a_target_that_takes_no_more_does_not_stop_the_others() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"one\ntwo\n")
    os.close(writing)
    logged = io.BytesIO()
    targets: list[IO[bytes]] = [Broken(), logged]
    with os.fdopen(reading, "rb") as source:
        copy(source, *targets)
    assert logged.getvalue() == b"one\ntwo\n"


# ---- run_logged, which sets handlers of signals ----


@pytest.fixture
def handlers() -> Iterator[None]:
    """Give back the handlers that there were."""
    before = {number: signal.getsignal(number) for number in PASSED_ON}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(script: str, log: Path) -> int:
    return run_logged(["bash", "-c", script], os.environ, log)


def test_both_streams_are_shown_apart_and_logged_together(
    handlers: None, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run("echo out; echo err >&2; exit 75", tmp_path / "log") == 75
    assert capfdbinary.readouterr() == (b"out\n", b"err\n")
    assert sorted((tmp_path / "log").read_bytes().splitlines()) == [b"err", b"out"]


def test_a_process_that_a_signal_ends_has_the_code_that_a_shell_says(
    handlers: None, tmp_path: Path
) -> None:
    assert run("kill -KILL $$", tmp_path / "log") == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_the_process_waited_for(
    handlers: None,
    tmp_path: Path,
    capfdbinary: pytest.CaptureFixture[bytes],
    number: signal.Signals,
) -> None:
    log = tmp_path / "log"

    def tell() -> None:
        # It is shown after the handlers were set.
        wait_until(lambda: log.exists() and log.read_bytes() == b"ready\n", "the process to begin")
        os.kill(os.getpid(), number)

    name = number.name.removeprefix("SIG")
    script = f"trap 'echo saved; exit 75' {name}; echo ready; while :; do sleep 0.05; done"
    teller = threading.Thread(target=tell)
    teller.start()
    assert run(script, log) == 75
    teller.join()
    assert capfdbinary.readouterr().out == b"ready\nsaved\n"


def test_a_reader_that_leaves_does_not_stop_the_process(
    handlers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as output:
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=output))
        assert run("seq 20000", tmp_path / "log") == 0
        monkeypatch.undo()
    # More than a pipe holds.
    assert (tmp_path / "log").read_bytes().endswith(b"\n20000\n")
