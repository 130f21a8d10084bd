"""How a script ends: its exit codes, and a reader that has left."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys

import pytest

from runfolder.errors import UserError
from tests.shared import CHECKOUT
from train.engine.errors import said_of_the_disk


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise UserError('data: is\\n empty')", 2, "error: data: is empty\n"),
        ("raise RunFailed('disk full')", 1, "error: disk full\n"),
        ("return 75", 75, ""),
        # Ctrl+C; the terminal shows it.
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_a_script_ends_with_one_line_and_its_code(body: str, code: int, said: str) -> None:
    done = run(body)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_reader_that_leaves_is_no_error() -> None:
    command = shlex.join([sys.executable, "-c", program("for _ in range(100_000): print('text')")])
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "text\n", "")


def program(body: str) -> str:
    return (
        "from train.engine.errors import RunFailed, UserError, run_to_exit\n"
        f"def main(argv):\n    {body}\n    return 0\n"
        "run_to_exit(main)\n"
    )


def run(body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program(body)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)


def test_what_the_locale_cannot_print_ends_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", program(r"print('caf\xe9 \u8a9e'); return 0")],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        cwd=CHECKOUT,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf\\xe9 \\u8a9e\n", b"")


def test_what_the_disk_says_is_one_line() -> None:
    line = r"^/datasets/rows: No space left on device$"
    with pytest.raises(UserError, match=line), said_of_the_disk():
        raise OSError(errno.ENOSPC, "No space left on device", "/datasets/rows")
