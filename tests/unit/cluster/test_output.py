"""output.py: a process's bytes shown as they come and logged, its errors once, its signals."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.output import copy
from tests.conftest import CHECKOUT


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
@settings(max_examples=50, deadline=None)
def test_what_is_no_error_is_copied_byte_for_byte(chunks: list[bytes]) -> None:
    if b"error: " not in b"".join(chunks):
        assert copied(*chunks) == b"".join(chunks)


output = b"one\nerror: x\nerror: y\nerror: x\nValueError: x\nerror: x\ntwo\nerror: y"
once = b"one\nerror: x\nerror: y\nValueError: x\ntwo\n"


@given(st.lists(st.integers(0, len(output)), max_size=6))
@settings(max_examples=50, deadline=None)
def test_an_error_that_was_said_is_not_said_again_however_the_bytes_come(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(output)]
    assert copied(*(output[a:b] for a, b in pairwise(places) if a < b)) == once


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def test_a_progress_bar_is_shown_before_its_line_ends() -> None:
    reading, writing = os.pipe()
    shown = io.BytesIO()
    with os.fdopen(reading, "rb") as source:
        thread = threading.Thread(target=copy, args=(source, shown))
        thread.start()
        for so_far in (b"\r 10%", b"\r 10%\r 20%", b"\r 10%\r 20% eta", b"\r 10%\r 20% eta\r"):
            os.write(writing, so_far.removeprefix(shown.getvalue()))
            wait_until(partial(_shows, shown, so_far), "the bar was held back")
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


# ---- run_logged, in a process of its own: it sets handlers of signals ----

PROGRAM = """
import os, sys
from pathlib import Path
from cluster.output import run_logged
sys.exit(run_logged(["bash", "-c", sys.argv[1]], os.environ, Path(sys.argv[2])))
"""


def start(script: str, log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, script, str(log)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_both_streams_are_shown_apart_and_logged_together(tmp_path: Path) -> None:
    process = start("echo out; echo err >&2; exit 75", tmp_path / "log")
    assert process.communicate(timeout=30) == (b"out\n", b"err\n")
    assert process.returncode == 75
    assert sorted((tmp_path / "log").read_bytes().splitlines()) == [b"err", b"out"]


def test_a_process_that_a_signal_ends_has_the_code_that_a_shell_says(tmp_path: Path) -> None:
    process = start("kill -KILL $$", tmp_path / "log")
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_the_process_waited_for(
    tmp_path: Path, number: signal.Signals
) -> None:
    name = number.name.removeprefix("SIG")
    script = (
        f"trap 'sleep 0.2; echo saved; exit 75' {name}; echo ready; while :; do sleep 0.05; done"
    )
    process = start(script, tmp_path / "log")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == b"saved\n"
    assert process.returncode == 75


def test_a_reader_that_leaves_does_not_stop_the_process(tmp_path: Path) -> None:
    process = start(
        "for i in $(seq 20000); do echo $i; done; touch " + str(tmp_path / "end"), tmp_path / "log"
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=30)
    assert (tmp_path / "end").exists()
    assert (tmp_path / "log").read_bytes().endswith(b"\n20000\n")
