"""transport.py: scripts in words that any login shell passes on whole."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import transport
from cluster.errors import UserError

SHELLS = [
    name for name in ("bash", "sh", "dash", "zsh", "fish", "tcsh", "csh") if shutil.which(name)
]


def run(
    shell: str, home: Path, script: str, data: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run a script as sshd would have a login shell run it."""
    return subprocess.run(
        [shell, "-c", transport.command(script)],
        check=False,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        input=data,
        capture_output=True,
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_gets_its_input_and_gives_its_output_and_exit_code(
    shell: str, tmp_path: Path
) -> None:
    script = "printf '%s\\n' \"it's a \\\\ \\$HOME !x *\"\ncat\necho no >&2\nexit 7"
    done = run(shell, tmp_path, script, b"\0\xff\n")
    assert done.returncode == 7
    assert done.stdout == b"it's a \\ $HOME !x *\n\0\xff\n"
    assert done.stderr.endswith(b"no\n")


def test_a_profile_neither_speaks_in_between_nor_takes_the_input(tmp_path: Path) -> None:
    (tmp_path / ".bash_profile").write_text("echo welcome; read line; export OF_THE_SITE=1")
    done = run("bash", tmp_path, 'echo "$OF_THE_SITE"; cat; env | grep -c SLUICE_', b"mine\n")
    assert done.stdout == b"1\nmine\n0\n"
    assert b"welcome" in done.stderr


@settings(max_examples=30)
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_through(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.getbasetemp()
    done = run("sh", home, f"printf %s {shlex.quote(text)}")
    assert done.stdout == text.encode()


def test_what_a_shell_says_unasked_is_no_part_of_an_answer(tmp_path: Path) -> None:
    script = transport.marked("echo this")
    output = b"fortune of the day\n" + run("bash", tmp_path, script).stdout
    assert transport.answer("login", 0, output, b"") == b"this\n"


@pytest.mark.parametrize(
    ("code", "output", "errors", "said"),
    [
        (1, transport.BEGINNING, b"x\n\x1b[31mno room\n\n", "a command failed there: .*no room"),
        (1, b"This account is not available.\n", b"", "no bash could be started there"),
        (0, b"This account is not available.\n", b"", "no bash could be started there"),
        (3, transport.BEGINNING, b"", "exit code 3"),
    ],
)
def test_a_script_that_fails_is_told_in_its_last_words(
    code: int, output: bytes, errors: bytes, said: str
) -> None:
    with pytest.raises(UserError, match=f"^login: .*{said}") as refusal:
        transport.answer("login", code, output, errors)
    assert "\x1b" not in str(refusal.value)
