"""What a process ends with is what Python itself makes of `sys.exit`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runfolder.exit_codes import of_system_exit


@pytest.mark.parametrize("code", [None, 0, 2, 75, "two words", ["a", 1]])
def test_the_code_of_a_system_exit_is_pythons_and_a_text_is_printed(
    code: object, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", f"import sys; sys.exit({code!r})"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (of_system_exit(code), capsys.readouterr().err) == (done.returncode, done.stderr)
