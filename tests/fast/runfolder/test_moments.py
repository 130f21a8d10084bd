"""Named points: a process stops where it is told to, and nobody waits for a point that is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.slurm.call import PASSED
from runfolder import launch, moments
from runfolder.errors import UserError
from tests.moments import Pause, is_stopped
from tests.shared import CHECKOUT
from tests.waiting import finish

# Comes five times to a moment, in the thread that writes checkpoints or in the first.
PROGRAM = """
import sys, threading
from runfolder.moments import reached
def come():
    for number in range(5):
        print(number, flush=True)
        reached("in-shard")
        reached("after-step")
thread = threading.Thread(target=come)
if sys.argv[1] == "thread":
    thread.start(), thread.join()
else:
    come()
"""


def start(pause: Pause | None, where: str = "first") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, where],
        cwd=CHECKOUT,
        env=os.environ | (pause.variable if pause else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("where", ["first", "thread"])
def test_a_process_stops_at_its_moment_and_goes_on_when_it_is_told(
    tmp_path: Path, where: str
) -> None:
    pause = Pause(tmp_path, "after-step", time=3)
    process = start(pause, where)
    assert process.stdout is not None
    assert pause.wait(lambda: process.poll() is None) == process.pid
    assert is_stopped(process.pid)
    # All that it has printed: it is not on its way to the next moment.
    os.set_blocking(process.stdout.fileno(), False)
    assert os.read(process.stdout.fileno(), 100) == b"0\n1\n2\n"
    os.set_blocking(process.stdout.fileno(), True)
    pause.go_on()
    done = finish(process)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n4\n", "")
    # Of the processes of a run only the first stops there; nothing else is left in the folder.
    assert finish(start(pause)).stdout == "0\n1\n2\n3\n4\n"
    assert [path.name for path in tmp_path.iterdir()] == ["after-step@3"]


def test_a_name_without_a_number_is_the_first_time(tmp_path: Path) -> None:
    pause = Pause(tmp_path, "after-step")
    pause.path = tmp_path / "after-step"
    with start(pause) as process:
        pause.wait(lambda: process.poll() is None)
        process.kill()
        assert process.stdout is not None
        assert process.stdout.read() == "0\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("before-renam", "'before-renam' is not a moment, or MOMENT@NUMBER; did you mean 'befo"),
        ("after-step@0", "'after-step@0' is not a moment, or MOMENT@NUMBER"),
        ("after-step@x", "'after-step@x' is not a moment, or MOMENT@NUMBER"),
    ],
)
def test_what_names_no_moment_is_refused(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_PAUSE_AT", str(tmp_path / name))
    for come in (
        moments.check,
        lambda: moments.reached("after-step"),
    ):
        with pytest.raises(UserError, match=f"^SLUICE_PAUSE_AT: {said}"):
            come()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_PAUSE_AT", str(tmp_path / "nowhere/after-step"))
    with pytest.raises(UserError, match=r"^SLUICE_PAUSE_AT: .*nowhere is not a folder$"):
        moments.check()


def test_every_moment_is_a_place_in_the_product_and_no_other_is() -> None:
    files = [*CHECKOUT.glob("train/**/*.py"), *CHECKOUT.glob("slurm/**/*.py")]
    found = {name for file in files for name in re.findall(r'reached\("(.*?)"\)', file.read_text())}
    assert found == set(moments.MOMENTS)


def test_the_variable_reaches_a_job_of_slurms() -> None:
    assert PASSED.fullmatch(moments.VARIABLE)


def test_the_variable_reaches_a_container_with_its_folder(tmp_path: Path) -> None:
    # Stands for apptainer: prints what it was to bind, and what is seen inside.
    fake = tmp_path / "apptainer"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"; env\n')
    fake.chmod(0o755)
    for name in ("run", "datasets", "scratch", "pauses"):
        (tmp_path / name).mkdir()
    program = 'cd "$0" && set -- && . slurm/environment.sh && exec "${python[@]}" x.py'
    values = dict.fromkeys(["binds", "container_flags", "host_python", "site_variables"], "")
    values |= {"image": "image.sif", "apptainer": str(fake), "cache": str(tmp_path / "cache")}
    values["datasets"] = str(tmp_path / "datasets")
    launch.write(tmp_path / "run", values, {"SLUICE_DEVICE": "cpu"})
    environment = {
        "PATH": os.environ["PATH"],
        "SLUICE_RUN_FOLDER": str(tmp_path / "run"),
        "SLUICE_SCRATCH": str(tmp_path / "scratch"),
        "SLUICE_PAUSE_AT": str(tmp_path / "pauses/after-step@3"),
    }
    done = subprocess.run(
        ["bash", "-euc", program, CHECKOUT],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    told = done.stdout.splitlines()
    assert f"APPTAINERENV_SLUICE_PAUSE_AT={tmp_path}/pauses/after-step@3" in told
    pauses = tmp_path / "pauses"
    assert f'type=bind,"source={pauses}","destination={pauses}"' in told
