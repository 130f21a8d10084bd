"""Keyboard-interactive in several rounds, and questions on a real terminal."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.login.config import resolve
from cluster.login.connection import connect
from runfolder.errors import UserError
from tests.real.cluster.login.answers import answers, signed_in
from tests.real.cluster.login.questioner import Questioner
from tests.real.cluster.login.screen import Screen
from tests.shared import CHECKOUT
from tests.waiting import run, wait_until

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
    with pytest.raises(UserError, match="denied for me; the server accepts keyboard-") as caught:
        connect(host, prompts=user, say=user.say)
    assert "\n" not in str(caught.value)


# ---- on a terminal ----

# A question alone; a sign-in has it after much else.
ASK = """
from cluster.errors import run_to_exit
from cluster.login.alarm import leave_on_signals
from cluster.login.prompts import Prompts
def main(argv):
    leave_on_signals()
    print("answered", len(Prompts().secret("Password: ")))
    return 0
run_to_exit(main)
"""
SIGN_IN = """
from cluster.errors import run_to_exit
from cluster.login import config, connection
def main(argv):
    with connection.connect(config.resolve("questioner", config={config!r})):
        print("signed in")
    return 0
run_to_exit(main)
"""


def program(text: str, *before: str) -> Screen:
    """Return a terminal in which a Python program runs, started by a shell's words if need be."""
    variables = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    return Screen([*before, sys.executable, "-c", text], variables)


def until_silent(screen: Screen) -> None:
    """Wait until what is typed is not shown."""
    wait_until(lambda: not screen.attributes()[3] & termios.ECHO, "silence", every_s=0.01)


@pytest.fixture
def question() -> Iterator[Screen]:
    """Return a terminal on which a password is asked for."""
    with program(ASK) as screen:
        screen.expect("Password: ")
        until_silent(screen)
        yield screen


def test_secrets_are_not_echoed(questioner: Questioner, tmp_path: Path) -> None:
    config = str(questioner.write_config(tmp_path))
    with program(SIGN_IN.format(config=config)) as screen:
        screen.expect("Password: ")
        until_silent(screen)
        screen.type("pass word\n")
        # What is no printable character cannot act on the terminal.
        screen.expect(r"Code from your \?\]0;owned\? token: ")
        screen.type("123456\n")
        screen.expect("PIN: ")
        until_silent(screen)
        screen.type("42\n")
        screen.expect("signed in")
        assert screen.wait() == 0
        assert screen.attributes() == screen.at_start
    assert b"123456" in screen.shown
    assert b"pass word" not in screen.shown and b"42" not in screen.shown


def test_ctrl_c_at_a_question_ends_the_sign_in(questioner: Questioner, tmp_path: Path) -> None:
    config = str(questioner.write_config(tmp_path))
    with program(SIGN_IN.format(config=config)) as screen:
        screen.expect("Password: ")
        until_silent(screen)
        screen.type("pass\x03")
        assert screen.wait() == 130
        assert screen.attributes() == screen.at_start


def test_ctrl_d_is_no_answer(question: Screen) -> None:
    question.type("\x04")
    question.expect("error: no answer to 'Password'")
    assert question.wait() == 2
    assert question.attributes() == question.at_start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_at_a_question_gives_the_terminal_back(question: Screen, number: int) -> None:
    question.process.send_signal(number)
    assert question.wait() == 128 + number
    assert question.attributes() == question.at_start


def test_the_terminal_is_asked_though_the_streams_are_elsewhere(tmp_path: Path) -> None:
    shell = f'"$@" </dev/null >{tmp_path}/seen 2>&1'
    with program(ASK, "bash", "-c", shell, "bash") as screen:
        screen.expect("Password: ")
        until_silent(screen)
        screen.type("pass word\n")
        assert screen.wait() == 0
    assert (tmp_path / "seen").read_text() == "answered 9\n"


def test_without_a_terminal_a_question_is_refused_in_one_line(
    clean_environment: dict[str, str],
) -> None:
    done = run(
        [sys.executable, "-c", ASK], cwd=CHECKOUT, env=clean_environment, start_new_session=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no terminal to ask")
    assert len(done.stderr.splitlines()) == 1
