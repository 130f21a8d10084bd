"""Keyboard-interactive in several rounds, and questions on a real terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.ssh.config import resolve
from cluster.ssh.connection import connect
from tests.cluster.ssh.answers import answers, signed_in
from tests.cluster.ssh.questioner import Questioner
from tests.conftest import CHECKOUT

pytestmark = pytest.mark.needs("sshd")
ROUNDS = [
    ("Two factors, please", [("Password: ", False, "pass word")]),
    ("", [("Code from your \x1b]0;owned\x07 token: ", True, "123456"), ("PIN: ", False, "42")]),
    ("A push was sent to your telephone", []),
]


@pytest.fixture
def questioner() -> Iterator[Questioner]:
    made = Questioner(ROUNDS)
    yield made
    made.stop()


def test_all_rounds_are_asked_and_only_what_may_be_seen_is_shown(
    questioner: Questioner, tmp_path: Path
) -> None:
    host = resolve("questioner", config=str(questioner.write_config(tmp_path)))
    user = answers(("Password: ", "pass word"), ("Code", "123456"), ("PIN", "42"))
    with signed_in(host, user):
        pass
    assert questioner.given == [["pass word"], ["123456", "42"], []]
    assert user.secret_questions == ["(me@127.0.0.1) Password: ", "(me@127.0.0.1) PIN: "]
    assert len(user.open_questions) == 1
    assert user.shown == ["Two factors, please", "A push was sent to your telephone"]


def test_a_wrong_code_begins_again_and_then_ends_in_one_line(
    questioner: Questioner, tmp_path: Path
) -> None:
    host = resolve("questioner", config=str(questioner.write_config(tmp_path)))
    right = ("Password: ", "pass word")
    user = answers(right, ("Code", "0"), ("PIN", "42"), right, ("Code", "123456"), ("PIN", "42"))
    with signed_in(host, user):
        pass
    assert "Permission denied, please try again." in user.shown

    user = answers(*[("Password: ", "wrong")] * 3)
    with pytest.raises(UserError, match="me was not let in; the server takes keyboard-") as caught:
        connect(host, prompts=user, say=user.say)
    assert "\n" not in str(caught.value)


# ---- on a terminal ----


class Session:
    """A client in a pseudo-terminal of its own, as the user sees it."""

    def __init__(self, config: Path, shell: str = 'exec "$@"') -> None:
        script = (
            "from cluster.ssh import config, connection; from cluster.errors import run_to_exit\n"
            f"host = config.resolve('questioner', config={str(config)!r})\n"
            "def main(argv):\n"
            "    with connection.connect(host): print('signed in')\n"
            "    return 0\n"
            "run_to_exit(main)"
        )
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(CHECKOUT)
            client = [sys.executable, "-c", script]
            # With jobs, as an interactive shell has them.
            os.execvp("bash", ["bash", "-m", "-c", shell, "bash", *client])
        self.before = termios.tcgetattr(self.terminal)
        self.text = ""

    def expect(self, words: str, times: int = 1) -> None:
        deadline = time.monotonic() + 20
        while self.text.count(words) < times:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.terminal], [], [], left)[0], self.text
            try:
                self.text += os.read(self.terminal, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"{words!r} did not come: {self.text!r}") from None

    def expect_mode(self, matches: Callable[[list[int]], bool]) -> None:
        deadline = time.monotonic() + 20
        while not matches(termios.tcgetattr(self.terminal)):  # type: ignore[arg-type]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def ends(self) -> int:
        """Return how it ended; the terminal has to be as it was."""
        status = os.waitpid(self.pid, 0)[1]
        assert termios.tcgetattr(self.terminal) == self.before
        return os.waitstatus_to_exitcode(status)


def is_silent(mode: list[int]) -> bool:
    return not mode[3] & termios.ECHO


@pytest.fixture
def session(questioner: Questioner, tmp_path: Path) -> Iterator[Session]:
    made = Session(questioner.write_config(tmp_path))
    made.expect("Password: ")
    made.expect_mode(is_silent)
    yield made
    os.close(made.terminal)


def test_secrets_are_not_echoed(session: Session) -> None:
    session.type("pass word\n")
    # What is no printable character cannot act on the terminal.
    session.expect("Code from your ?]0;owned? token: ")
    session.type("123456\n")
    session.expect("PIN: ")
    session.expect_mode(is_silent)
    session.type("42\n")
    session.expect("signed in")
    assert session.ends() == 0
    assert "123456" in session.text
    assert "pass word" not in session.text and "42" not in session.text


def test_ctrl_c_at_a_question_ends_with_130(session: Session) -> None:
    session.type("pass\x03")
    assert session.ends() == 130


def test_ctrl_c_twice_at_a_terminal_that_stands_still_gives_it_back(session: Session) -> None:
    session.type("\x13")
    time.sleep(0.2)
    # The key would have it go on.
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):
            os.kill(session.pid, signal.SIGINT)
        time.sleep(0.3)
    assert session.ends() == 130


def test_ctrl_d_is_no_answer(session: Session) -> None:
    session.type("\x04")
    session.expect("error: no answer to '(me@127.0.0.1) Password'")
    assert session.ends() == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_at_a_question_gives_the_terminal_back(session: Session, number: int) -> None:
    os.kill(session.pid, number)
    assert session.ends() == -number


def test_ctrl_z_at_a_question_gives_the_terminal_back_and_asks_again(
    questioner: Questioner, tmp_path: Path
) -> None:
    shell = '"$@"; echo "stopped with $(stty -a | grep -ow -e "-echo" -e echo)"; fg >/dev/null'
    session = Session(questioner.write_config(tmp_path), shell)
    session.expect("Password: ")
    session.expect_mode(is_silent)
    session.type("pass\x1a")
    session.expect("stopped with echo")
    session.expect("Password: ", 2)
    session.expect_mode(is_silent)
    session.type("pass word\n")
    session.expect("token: ")
    session.type("\x03")
    assert session.ends() == 130
    os.close(session.terminal)


def test_the_terminal_is_asked_though_the_streams_are_elsewhere(
    questioner: Questioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = '"$@" </dev/null >"$SEEN" 2>&1'
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    session = Session(questioner.write_config(tmp_path), shell)
    for question, answer in (("Password: ", "pass word"), ("token: ", "123456"), ("PIN: ", "42")):
        session.expect(question)
        session.type(f"{answer}\n")
    assert session.ends() == 0
    os.close(session.terminal)
    assert "signed in" in (tmp_path / "seen").read_text()
