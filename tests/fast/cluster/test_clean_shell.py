"""clean_shell.py: a script in words that any shell passes on, run where no login file spoils it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import clean_shell
from runfolder.errors import UserError

SHELLS = [
    name for name in ("bash", "sh", "dash", "zsh", "fish", "tcsh", "csh") if shutil.which(name)
]
PATH = "/usr/bin:/bin"
EVERY_BYTE = bytes(range(256))


def run(
    home: Path,
    script: str,
    data: bytes = b"",
    *,
    started_by: str = "bash",
    modules: Sequence[str] = (),
    slow_s: float = 60,
    limit_s: float = 60,
    account: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a script as sshd would have an account's shell run it, with the `account`'s variables."""
    command = clean_shell.command(script, modules, slow_s=slow_s, limit_s=limit_s)
    return subprocess.run(
        [shutil.which(started_by) or started_by, "-c", command],
        check=False,
        cwd=home,
        env={"HOME": str(home), "PATH": PATH, **(account or {})},
        input=data,
        capture_output=True,
    )


def ask(home: Path, script: str, data: bytes = b"") -> bytes:
    """Return a script's answer."""
    answer = clean_shell.Answer.of(script)
    done = run(home, answer.script, data)
    answer.take(done.stdout)
    answer.take_error(done.stderr)
    return answer.words("login", done.returncode)


@pytest.mark.parametrize("started_by", SHELLS)
def test_a_script_gets_its_input_and_gives_its_output_and_exit_code(
    started_by: str, tmp_path: Path
) -> None:
    script = "printf '%s\\n' \"it's a \\\\ \\$HOME !x *\"\ncat\necho no >&2\nexit 7"
    done = run(tmp_path, script, EVERY_BYTE, started_by=started_by)
    assert done.returncode == 7
    assert done.stdout == b"it's a \\ $HOME !x *\n" + EVERY_BYTE
    assert done.stderr.endswith(b"no\n")


@settings(max_examples=30)
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_through(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.getbasetemp()
    done = run(home, f"printf %s {shlex.quote(text)}", started_by="sh")
    assert done.stdout == text.encode()


# What people have in their login files; each is to leave a script's input, output and code alone.
SPOILERS = {
    "a greeting, and a question": "echo welcome; read line",
    "output that goes elsewhere": "exec >greeting 2>&1",
    "cd that lists": 'cd() { builtin cd "$@" && ls; }; export -f cd',
    "printf, exec and builtin": "printf() { :; }; exec() { :; }; builtin() { :; }",
    "aliases": "shopt -s expand_aliases; alias cd=ls cat=ls printf=ls exec=ls",
    "traps": "trap 'echo bye; exit 5' EXIT; trap 'echo debug' DEBUG; trap 'exit 6' ERR",
    "strict": "set -eux; shopt -s nullglob; export SHELLOPTS BASHOPTS",
    "a file for every shell": "echo 'echo up; cd() { ls; }' >~/x; export BASH_ENV=~/x ENV=~/x",
    "another folder": "mkdir -p sub; cd sub; export CDPATH=/usr",
    "ignored signals": "trap '' INT TERM PIPE",
    "words of ours": "echo done; printf 'done\\0'; printf -- '-- sluice --'",
    "a value of two lines": "export LINES_OF_IT=$'a\\ndone\\nb' EMPTY=",
    "what may not be changed": "declare -rx OURS=1; readonly umask_=2; export UID EUID PPID",
}


@pytest.mark.parametrize("spoiler", SPOILERS.values(), ids=SPOILERS)
def test_no_login_file_gets_between(spoiler: str, tmp_path: Path) -> None:
    (tmp_path / ".bash_profile").write_text(f"{spoiler}\n")
    (tmp_path / ".bash_logout").write_text("echo logged out; exit 9\n")
    # Also in a shell that the script starts, as ours do.
    inner = "cd /usr/.. && pwd && cat"
    done = run(tmp_path, f"cd / && pwd && bash -c {shlex.quote(inner)}; exit 3", EVERY_BYTE)
    assert (done.returncode, done.stdout) == (3, b"/\n/\n" + EVERY_BYTE), done.stderr


def test_nor_does_what_the_accounts_own_shell_has_exported(tmp_path: Path) -> None:
    """A .bashrc is read by the shell that sshd starts, before any word of ours."""
    (tmp_path / "env").write_text("pwd() { echo pwd; }\n")
    account = {"BASH_FUNC_cd%%": "() { echo cd; }", "BASH_ENV": str(tmp_path / "env")}
    account |= {"SHELLOPTS": "braceexpand:hashall:noglob", "CDPATH": "/usr"}
    script = "cd bin && cd / && bash -c 'cd bin; pwd; echo /et*; declare -F'"
    done = run(tmp_path, "cd / && " + script, account=account)
    assert (done.returncode, done.stdout) == (0, b"/bin\n/etc\n"), done.stderr


def test_what_a_login_sets_up_is_there(tmp_path: Path) -> None:
    profile = "export OF_THE_SITE=$'a\\n b'; PATH=$PATH:/site; umask 027; ulimit -S -c 0 -n 99"
    (tmp_path / ".bash_profile").write_text(profile)
    done = run(tmp_path, 'echo "$OF_THE_SITE"; echo "$PATH"; umask; ulimit -S -c; ulimit -S -n')
    lines = done.stdout.split(b"\n")
    assert lines[:2] == [b"a", b" b"]
    assert lines[2].endswith(b":/site")
    assert lines[3:6] == [b"0027", b"0", b"99"]


MODULE = """
module() { [[ $1 == load && $2 != none ]] && export "MODULE_$2=1" || { echo "no $2"; return 1; }; }
"""


def test_modules_are_loaded_by_the_login_shell_and_one_that_is_not_there_is_named(
    tmp_path: Path,
) -> None:
    (tmp_path / ".bash_profile").write_text(MODULE)
    (tmp_path / ".bash_logout").write_text("exit 0")
    script = "echo $MODULE_a$MODULE_b"
    assert run(tmp_path, script, modules=["a", "b"]).stdout == b"11\n"
    done = run(tmp_path, script, modules=["a", "none", "b"])
    assert (done.returncode, done.stdout) == (2, b"")
    first, second = done.stderr.decode().splitlines()
    assert first == "no none"
    assert re.match(r"error: .*: none could not be loaded", second)


@pytest.mark.parametrize(
    "ends", ["exec dash", "exec true", "exit 0", "kill -9 $$", "set -e; false"]
)
def test_a_profile_that_ends_or_replaces_the_shell_is_named_and_nothing_runs(
    ends: str, tmp_path: Path
) -> None:
    (tmp_path / ".profile").write_text(ends)
    done = run(tmp_path, "touch ran; echo ran")
    assert (done.returncode, done.stdout) == (2, b"")
    assert f"{tmp_path}/.profile" in done.stderr.decode().splitlines()[-1]
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=rf"^login: .*\({tmp_path}/.profile, or /etc/profile\)"):
        ask(tmp_path, "touch ran; echo ran")


def test_a_profile_that_hangs_is_named_while_it_does_and_given_up(tmp_path: Path) -> None:
    (tmp_path / ".bash_profile").write_text(
        "while read -r x </dev/null; do :; done; read -r x <pipe"
    )
    subprocess.run(["mkfifo", tmp_path / "pipe"], check=True)
    done = run(tmp_path, "echo ran", slow_s=0.1, limit_s=0.1)
    assert (done.returncode, done.stdout) == (2, b"")
    note, error = done.stderr.decode().splitlines()
    assert note.startswith("note: ") and error.startswith("error: ")
    assert f"{tmp_path}/.bash_profile" in note and f"{tmp_path}/.bash_profile" in error


def test_a_profile_that_is_slow_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / ".bash_profile").write_text("read -r x <pipe; export X=$x")
    subprocess.run(["mkfifo", tmp_path / "pipe"], check=True)
    # It goes on when it was said that it is slow.
    script = f"exec 2> >(read -r note; echo late >{tmp_path}/pipe; cat >&2)\n"
    command = script + clean_shell.command('echo "$X"', slow_s=0.1)
    done = subprocess.run(
        ["bash", "-c", command],
        env={"HOME": str(tmp_path), "PATH": PATH},
        capture_output=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, b"late\n")


# ---- answers ----


def test_what_is_said_before_and_after_is_no_part_of_an_answer(tmp_path: Path) -> None:
    answer = clean_shell.Answer.of("printf 'a\\n\\nb'")
    done = run(tmp_path, answer.script)
    for piece in (b"fortune\n-- sluice", b" --\n", *(done.stdout[i : i + 1] for i in range(200))):
        answer.take(piece)
    assert answer.code == 0
    answer.take(b"bye\n-- sluice --\n")
    # The code of the session is that of a logout file, or of a wrapper.
    assert answer.words("login", 7) == b"a\n\nb"


def test_an_answer_may_have_every_byte_and_the_lines_of_another_one(tmp_path: Path) -> None:
    other = clean_shell.Answer.of("echo inside")
    before = run(tmp_path, other.script).stdout
    assert ask(tmp_path, "cat", before + EVERY_BYTE) == before + EVERY_BYTE


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo x; printf 'x\\n\\e[31mno room\\n\\n' >&2; exit 1", r"failed there: \?\[31mno room"),
        ("false", "a command failed there: exit code 1"),
        ("set -eu; echo $NOTHING", "NOTHING: unbound variable"),
        ("kill -9 $BASHPID", "Killed"),
    ],
)
def test_a_script_that_fails_is_told_in_its_last_words(
    script: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / ".bash_logout").write_text("echo bye >&2; exit 0")
    with pytest.raises(UserError, match=f"^login: .*{said}"):
        ask(tmp_path, script)


@pytest.mark.parametrize("code", [0, 1])
def test_an_account_without_a_shell_is_told_in_its_own_words(code: int) -> None:
    answer = clean_shell.Answer.of("echo x")
    answer.take(b"This account is not available.\n")
    with pytest.raises(UserError, match=r"^login: bash could not be started there: This account"):
        answer.words("login", code)


def test_notes_are_shown_at_once_and_are_no_last_words() -> None:
    answer = clean_shell.Answer.of("false")
    assert answer.take_error(b"welcome\nnote: x: slow") == []
    assert answer.take_error(b"ly\nno room\nnote: y\n") == ["note: x: slowly", "note: y"]
    with pytest.raises(UserError, match=r"bash could not be started there: no room;"):
        answer.words("login", 1)
