"""launch.env: what Python writes, bash and Python read, whatever is in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from runfolder import launch
from runfolder.errors import UserError

ODD = {"binds": "/a b:/a b:ro\n/c:/c:rw", "empty": "", "quoted": 'it\'s $HOME `x` "y" # z \\'}


def test_bash_and_python_read_what_was_written(tmp_path: Path) -> None:
    launch.write(tmp_path, ODD, {"NCCL_X": "a;b"})
    assert launch.read(tmp_path) == ODD | {"NCCL_X": "a;b"}
    script = 'source "$0/launch.env"; printf "%s\\0" "$binds" "$empty" "$quoted"; env --null'
    done = subprocess.run(
        ["bash", "-euc", script, tmp_path], capture_output=True, text=True, check=True, env={}
    )
    *values, _ = done.stdout.split("\0")
    assert values[:3] == list(ODD.values())
    # Only what is meant for the processes reaches them.
    seen = dict(line.split("=", 1) for line in values[3:])
    assert seen["NCCL_X"] == "a;b"
    assert not set(ODD) & set(seen)


@pytest.mark.parametrize("text", ["a='b", "a b", "=x", "rm -r x"])
def test_a_damaged_one_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "launch.env").write_text(text)
    with pytest.raises(UserError, match=r"launch\.env: cannot be read: "):
        launch.read(tmp_path)
    (tmp_path / "launch.env").unlink()
    with pytest.raises(UserError, match="No such file"):
        launch.read(tmp_path)
