"""runfolder/lock.py: one run at a time works on a folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runfolder import lock as module
from runfolder.errors import UserError
from runfolder.lock import lock
from tests.shared import CHECKOUT

HOLDER = """
import sys
from pathlib import Path
from runfolder.lock import lock
lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Return another process that holds the lock of `tmp_path`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_folder_that_another_process_works_on_is_refused_and_says_who(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    for _ in range(2):  # a refusal does not disturb the holder, nor what is said of it
        with pytest.raises(UserError) as error:
            lock(tmp_path)
        said = str(error.value)
        assert said.startswith(f"{tmp_path}: in use by another run (process {holder.pid} on ")
        assert " since 20" in said


def test_the_lock_is_free_again_when_its_holder_is_killed(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    holder.kill()
    holder.wait()
    os.close(lock(tmp_path))


def test_in_a_step_of_slurms_it_waits_for_the_lock_of_an_attempt_that_is_over(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_STEP", "1")
    waits = []

    def end_the_holder(seconds: float) -> None:
        waits.append(seconds)
        holder.kill()
        holder.wait()

    monkeypatch.setattr(module.time, "sleep", end_the_holder)
    os.close(lock(tmp_path))
    assert len(waits) == 1
    monkeypatch.setattr(module, "LEASE_S", 0)
    held = lock(tmp_path)
    with pytest.raises(UserError, match="in use by another run"):
        lock(tmp_path)
    os.close(held)


def test_nothing_is_left_of_what_an_earlier_holder_said(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("process 4194303 on a-node-with-a-long-name since ever" * 2)
    descriptor = lock(tmp_path)
    content = (tmp_path / "run.lock").read_text()
    assert re.fullmatch(rf"process {os.getpid()} on \S+ since 20[\d-]+ [\d:]+", content)
    os.close(descriptor)


def test_the_same_process_does_not_work_on_a_folder_twice(tmp_path: Path) -> None:
    descriptor = lock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        lock(tmp_path)
    os.close(descriptor)
    os.close(lock(tmp_path))


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: cannot be written: No such file"):
        lock(tmp_path / "gone")
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        lock(tmp_path)
