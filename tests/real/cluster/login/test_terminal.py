"""The real client in a real terminal, with a real server: what `make ssh` is."""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.cluster.login.relay import Relay
from tests.real.cluster.login.screen import CLIENT, Screen, environment, session
from tests.real.cluster.login.server import Server
from tests.shared import CHECKOUT
from tests.waiting import descendants, wait_until

pytestmark = pytest.mark.needs("sshd")

CTRL_C, CTRL_D, CTRL_Z, CTRL_BACKSLASH = "\x03", "\x04", "\x1a", "\x1c"


def given_back(screen: Screen) -> None:
    """Check that the terminal is as it was."""
    assert screen.attributes() == screen.at_start


@pytest.fixture(scope="module")
def shells() -> Iterator[list[Screen]]:
    """The sessions that are at a prompt of the far side's shell: one, or none."""
    kept: list[Screen] = []
    yield kept
    for screen in kept:
        screen.type("\rexit\r")
        assert screen.wait() == 0
        given_back(screen)
        screen.close()


@pytest.fixture
def shell(server: Server, shells: list[Screen]) -> Iterator[Screen]:
    """Return a session at a prompt of the far side's shell, for a test that comes back to it."""
    screen = shells.pop() if shells else session(server)
    screen.resize(80, 24)
    yield screen
    # One that a test broke off is none of the next one's.
    screen.resize(80, 24)
    screen.type("\recho the\\ end\r")
    screen.expect(r"\nthe end\r\n")
    screen.expect("there> ")
    shells.append(screen)


def foreground(server: Server, name: str) -> None:
    """Wait until a program of this name has the far side's terminal, and runs."""

    def has_it() -> bool:
        for pid, found in descendants(server.process.pid).items():
            if found == name:
                state, _, group, _, _, holder = stat(pid)[:6]
                return state in "RSD" and group == holder
        return False

    wait_until(has_it, f"{name} in the foreground", every_s=0.02)


def stat(pid: int) -> list[str]:
    """Return what /proc/PID/stat says after the name: state, parent, group, session, tty, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ["gone"] * 6


def test_the_size_is_right_at_the_start_and_after_each_change(shell: Screen) -> None:
    shell.type("stty size\r")
    shell.expect(r"\r\n24 80\r\n")
    shell.resize(132, 43)
    shell.expect("there> ")
    shell.type("until stty size | grep '^43 132$'; do :; done\r")
    shell.expect(r"43 132\r\n")
    for columns in range(100, 130):
        shell.resize(columns, 30)
    shell.type("until stty size | grep '^30 129$'; do :; done\r")
    # No new line before it, if the shell redraws its own while it is resized.
    shell.expect(r"30 129\r\n")


def test_control_characters_are_for_the_far_side(server: Server) -> None:
    with session(server) as screen:
        screen.type("sleep 1000; echo ended=$?\r")
        foreground(server, "sleep")
        screen.type(CTRL_C)
        screen.expect(r"\^C")
        screen.expect("there> ")
        screen.type("echo code=$?\r")
        screen.expect(r"\ncode=130")
        screen.type("sleep 1001\r")
        foreground(server, "sleep")
        screen.type(CTRL_Z)
        screen.expect("Stopped")
        screen.type("fg\r")
        foreground(server, "sleep")
        screen.type(CTRL_BACKSLASH)
        screen.expect("Quit")
        screen.expect("there> ")
        screen.type(CTRL_D)
        assert screen.wait() == 131
        screen.expect("Connection to server closed.\r\n")
        given_back(screen)


def test_the_far_side_speaks_the_language_of_this_one(server: Server) -> None:
    server.write_config("SendEnv LANG LC_*")
    command = [*CLIENT, "--command", "echo $TERM $LANG $LC_TIME="]
    with Screen(command, environment(server, LANG="de_DE.UTF-8", LC_TIME="C")) as screen:
        screen.expect(r"xterm-256color de_DE\.UTF-8 C=")
        assert screen.wait() == 0


def test_vim_draws_and_leaves_a_clean_screen(shell: Screen, tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("first line\nsecond line\n")
    shell.type(f"cd {tmp_path}\rvim -u NONE -c 'set mouse=a' file.txt\r")
    shell.expect(rb"\x1b\[\?1049h")
    shell.expect("second line")
    shell.type("Gothird line: \u00e4\u20ac\x1b:wq\r")
    shell.expect(rb"\x1b\[\?1049l")
    shell.expect("there> ")
    assert file.read_text() == "first line\nsecond line\nthird line: \u00e4\u20ac\n"


# What copies byte by byte.
COPY = "import os; [os.write(1, os.read(0, 1)) for _ in range({})]"


def test_utf8_survives_wherever_it_is_cut(shell: Screen) -> None:
    text = "äöü€\U0001f600 ずっと".encode()
    shell.type(f"stty raw -echo; echo copying; python3 -c '{COPY.format(len(text))}'; stty sane\r")
    shell.expect("\ncopying\r?\n")
    for byte in text:
        shell.type(bytes((byte,)))
        shell.expect(re.escape(bytes((byte,))))
    shell.expect("there> ")


def test_a_lot_that_is_pasted_arrives(shell: Screen) -> None:
    # More than a terminal takes while nobody reads it.
    text = "".join(f"{number:09d}\n" for number in range(20_000))
    shell.type("stty raw -echo; echo ready; head -c 200000 | md5sum; stty sane\r")
    shell.expect("\nready\r?\n")
    shell.type(text)
    shell.expect(hashlib.md5(text.encode()).hexdigest())
    shell.expect("there> ")


# ---- the client's own keys ------------------------------------------------------------------


def test_tilde_keys(server: Server) -> None:
    with session(server) as screen:
        screen.type("\recho a~b '~~' ~x\r")
        screen.expect(r"\na~b ~~ ~x\r\n")
        screen.type("~~.\r")
        screen.expect(r"~\.: command not found")
        screen.type("~.")
        assert screen.wait() == 255
        screen.expect(r"~\.\r\n")
        screen.expect("Connection to server closed.\r\n")
        given_back(screen)


def test_tilde_period_ends_a_session_with_a_dead_peer(server: Server) -> None:
    with (
        Relay(server.port, is_narrow=True) as relay,
        session(server, config=relay.config(server)) as screen,
    ):
        relay.cut()
        # Far more than is taken on the way: whoever sends it, waits.
        screen.type(b"#" * 500_000 + b"\r~.")
        assert screen.wait() == 255
        given_back(screen)


def test_the_first_line_too_meets_a_raw_terminal(server: Server) -> None:
    with session(server, "--command", r"printf 'a\nb\n'") as screen:
        assert screen.wait() == 0
        # One that is not raw yet would add a second \r.
        assert screen.shown.startswith(b"a\r\nb\r\n"), screen.shown


@pytest.mark.parametrize("end", ["~.", signal.SIGTERM])
def test_a_terminal_that_stands_still_is_given_back(server: Server, end: str | int) -> None:
    with session(server, "--command", "yes") as screen:
        screen.expect("y\r\n")
        wait_until(screen.is_full, "the terminal to be full", every_s=0.01)
        if isinstance(end, str):
            screen.type(end)
        else:
            screen.process.send_signal(end)
            # Nobody reads what it shows.
            screen.process.wait()
        assert screen.wait() == (255 if end == "~." else 128 + signal.SIGTERM)
        given_back(screen)


def test_a_window_may_change_when_the_program_has_closed_its_output(
    server: Server, tmp_path: Path
) -> None:
    silent, done = tmp_path / "silent", tmp_path / "done"
    command = f"exec <&- >&- 2>&-; : >{silent}; until [ -e {done} ]; do sleep 0.05; done; exit 7"
    with session(server, "--command", command) as screen:
        wait_until(silent.exists, "a closed output", every_s=0.01)
        wait_until(lambda: "send eof" in server.log, "its end on the way", every_s=0.01)
        for columns in (70, 90):
            screen.resize(columns, 30)
        done.touch()
        assert screen.wait() == 7


def test_one_connection_serves_one_command_after_the_other(server: Server) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(CHECKOUT)!r})
from cluster.login import config, connection, session
host = config.resolve("server", config={str(server.config)!r})
with connection.connect(host) as c:
    print([session.run(c, f"tty >/dev/null && exit {{n}}", tty=True) for n in range(3)])
    print([session.run(c, "cat; exit 4", tty=False, reads_input=False)])
"""
    with Screen([CLIENT[0], "-c", script], environment(server)) as screen:
        screen.expect(r"\[0, 1, 2\]\r\n\[4\]\r\n")
        assert screen.wait() == 0
        given_back(screen)
