"""once.py: made by one of many processes, whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runfolder.errors import UserError
from tests import waiting
from tests.shared import CHECKOUT
from train.engine.once import CutOff, make_once

# Makes FOLDER, half of it before its stdin is closed; notes each making, to be counted.
PROGRAM = """
import sys
from pathlib import Path
from train.engine.once import make_once
folder = Path(sys.argv[1])
home = folder.parent.parent

def make(out):
    with (home / "makings").open("a") as stream:
        stream.write("x")
    (out / "first").mkdir()
    sys.stdin.read()
    (out / "last").touch()

make_once(folder, make, "it")
assert (folder / "last").exists()
"""


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_it_is_made_once_and_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Path] = []
    for _ in range(2):
        folder = make_once(tmp_path / "a/b", made.append, "the thing")
        assert folder == tmp_path / "a/b"
        assert folder.is_dir()
    assert len(made) == 1
    assert capsys.readouterr().out == "staging the thing\n"


def test_of_two_processes_one_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    processes = [start(folder) for _ in range(2)]
    said = [process.stdout.readline() for process in processes if process.stdout]
    assert sorted(said) == [
        "staging it\n",
        "waiting for another process that is staging it or similar\n",
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    assert [waiting.finish(process).returncode for process in processes] == [0, 0]
    assert (tmp_path / "makings").read_text() == "x"


def test_killed_in_the_middle_it_is_not_there_and_the_next_process_makes_it(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "a/b"
    killed = start(folder)
    waiting.wait_until((tmp_path / "a/.b.unfinished/first").exists, "the half is there")
    with killed:
        killed.kill()
    assert not folder.exists()
    # What the killed one left is in nobody's way, its lock neither.
    assert waiting.finish(start(folder)).returncode == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".lock", "b"]
    assert sorted(path.name for path in folder.iterdir()) == ["first", "last"]


@pytest.mark.parametrize("error", [UserError("x"), RuntimeError("x"), KeyboardInterrupt()])
def test_a_making_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def make(out: Path) -> None:
        (out / "half").touch()
        raise error

    with pytest.raises(type(error)):
        make_once(tmp_path / "a", make, "it")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("error", [CutOff("x"), KeyboardInterrupt()])
def test_a_download_that_is_cut_off_goes_on_with_what_it_has(
    tmp_path: Path, error: BaseException
) -> None:
    def first(out: Path) -> None:
        (out / "half").touch()
        raise error

    with pytest.raises(type(error)):
        make_once(tmp_path / "a", first, "it", goes_on=True)
    assert not (tmp_path / "a").exists()
    make_once(tmp_path / "a", lambda out: (out / "rest").touch(), "it", goes_on=True)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["half", "rest"]


def test_a_download_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    def refuse(out: Path) -> None:
        raise UserError("there is no such model")

    with pytest.raises(UserError):
        make_once(tmp_path / "a", refuse, "it", goes_on=True)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_a_network_what_needs_one_is_refused_unless_it_is_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^it is not staged; run `make fetch` where"):
        make_once(tmp_path / "a", Path.touch, "it", online=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    assert make_once(tmp_path / "a", Path.touch, "it", online=False) == tmp_path / "a"


def test_a_place_that_is_read_only_serves_what_is_there(tmp_path: Path) -> None:
    # As on a compute node; root may write anywhere, so that here a file is in the way.
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^SLUICE_DATASETS: {tmp_path}/file is not a folder"):
        make_once(tmp_path / "file/a/b", Path.touch, "it")
    (tmp_path / "there").mkdir(mode=0o555)
    if os.geteuid() != 0:
        with pytest.raises(UserError, match=r"^SLUICE_DATASETS: .*there is not writable"):
            make_once(tmp_path / "there/a", Path.touch, "it")
    assert make_once(tmp_path / "there", Path.touch, "it") == tmp_path / "there"
