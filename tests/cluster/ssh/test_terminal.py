"""The real client in a real terminal, with a real server: what `make ssh` is."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.ssh.relay import Relay
from tests.cluster.ssh.screen import CLIENT, Screen, environment, plain_shell, session
from tests.cluster.ssh.server import NewServer, Server
from tests.conftest import CHECKOUT

pytestmark = pytest.mark.needs("sshd")

CTRL_C, CTRL_D, CTRL_Z, CTRL_BACKSLASH = "\x03", "\x04", "\x1a", "\x1c"


def given_back(screen: Screen) -> None:
    """Check that the terminal is as it was."""
    assert screen.attributes() == screen.at_start
    assert screen.left_on() == b""


def test_the_size_is_right_at_the_start_and_after_each_change(server: Server) -> None:
    with session(server) as screen:
        screen.type("stty size\r")
        screen.expect(r"\r\n24 80\r\n")
        screen.resize(132, 43)
        screen.expect("there> ")
        screen.type("until stty size | grep '^43 132$'; do :; done\r")
        screen.expect(r"43 132\r\n")
        for columns in range(100, 130):
            screen.resize(columns, 30)
        screen.type("until stty size | grep '^30 129$'; do :; done\r")
        # No new line before it, if the shell redraws its own while it is resized.
        screen.expect(r"30 129\r\n")


def test_control_characters_are_for_the_far_side(server: Server) -> None:
    with session(server) as screen:
        screen.type("sleep 1000; echo ended=$?\r")
        screen.expect("sleep")
        time.sleep(0.5)
        screen.type(CTRL_C)
        screen.expect(r"\^C")
        screen.expect("there> ")
        screen.type("echo code=$?\r")
        screen.expect(r"\ncode=130")
        screen.type("sleep 1001\r")
        screen.expect("1001\r\n")
        time.sleep(0.5)
        screen.type(CTRL_Z)
        screen.expect("Stopped")
        screen.type("fg\r")
        screen.expect("sleep 1001\r\n")
        time.sleep(0.5)
        screen.type(CTRL_BACKSLASH)
        screen.expect("Quit")
        screen.expect("there> ")
        screen.type(CTRL_D)
        assert screen.wait() == 131
        screen.expect("Connection to server closed.\r\n")
        given_back(screen)


def test_the_shell_is_a_login_shell_with_this_terminal_and_language(
    new_server: NewServer,
) -> None:
    server = new_server()
    server.write_config("SendEnv LANG LC_*")
    command = "echo $TERM $LANG $LC_TIME=; stty -a"
    with session(server, "--command", command, LANG="de_DE.UTF-8", LC_TIME="C") as screen:
        screen.expect(r"xterm-256color de_DE\.UTF-8 C=")
        assert screen.wait() == 0
    text = screen.shown.decode()
    # A key of the terminal here that the far side's would not have by itself.
    assert "iutf8" not in text.replace("-iutf8", "")
    assert "erase = ^?" in text


def test_the_far_terminal_is_set_as_this_one(server: Server) -> None:
    script = 'stty erase ^H iutf8; exec "$@" -m cluster.ssh --command "stty -a"'
    command = ["sh", "-c", script, "sh", CLIENT[0]]
    with Screen(command, environment(server)) as screen:
        assert screen.wait() == 0
    text = screen.shown.decode()
    assert "erase = ^H" in text
    assert re.search(r"(?<!-)iutf8", text)


def test_vim_draws_and_leaves_a_clean_screen(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("first line\nsecond line\n")
    with session(server) as screen:
        screen.type(f"cd {tmp_path}\rvim -u NONE -c 'set mouse=a' file.txt\r")
        screen.expect(rb"\x1b\[\?1049h")
        screen.expect("second line")
        assert screen.left_on() != b""
        screen.type("Gothird line: \u00e4\u20ac\x1b:wq\r")
        screen.expect(rb"\x1b\[\?1049l")
        screen.expect("there> ")
        assert screen.left_on() == b""
        screen.type("exit\r")
        assert screen.wait() == 0
        given_back(screen)
    assert file.read_text() == "first line\nsecond line\nthird line: \u00e4\u20ac\n"


def test_top_draws_and_leaves_a_clean_screen(server: Server) -> None:
    with session(server) as screen:
        screen.type("top -d 0.2\r")
        screen.expect("load average")
        screen.expect("load average")
        screen.resize(60, 20)
        screen.type("q")
        screen.expect("there> ")
        assert screen.left_on() == b""
        screen.type("exit\r")
        assert screen.wait() == 0
        given_back(screen)


def test_utf8_survives_wherever_it_is_cut(server: Server) -> None:
    text = "äöü€\U0001f600 ずっと"
    script = "import sys,time\nfor b in sys.stdin.buffer.readline(): sys.stdout.buffer.write("
    script += "bytes([b])); sys.stdout.flush(); time.sleep(.001)"
    with session(server) as screen:
        screen.type(f"stty -echo; python3 -c '{script}'\r")
        screen.expect("\r\n")
        time.sleep(0.1)
        for byte in f"{text}\r".encode():
            screen.type(bytes((byte,)))
            time.sleep(0.002)
        screen.expect(re.escape(text))


def test_a_lot_that_is_pasted_arrives(server: Server) -> None:
    # More than a terminal takes while nobody reads it.
    text = "".join(f"{number:09d}\n" for number in range(20_000))
    with session(server, "--command", "stty -echo raw; echo ready; head -c 200000 | md5sum") as s:
        s.expect("ready")
        s.type(text)
        s.expect(hashlib.md5(text.encode()).hexdigest())
        assert s.wait() == 0


# ---- the client's own keys ------------------------------------------------------------------


def test_tilde_keys(server: Server) -> None:
    with session(server) as screen:
        screen.type("~?")
        screen.expect(r"~\?\r\nSupported escape sequences:\r\n ~\.   - end")
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
    for _ in range(5):
        with session(server, "--command", r"printf 'a\nb\n'") as screen:
            assert screen.wait() == 0
            # One that is not raw yet would add a second \r.
            assert screen.shown.startswith(b"a\r\nb\r\n"), screen.shown


def test_another_escape_character(new_server: NewServer) -> None:
    server = new_server()
    server.write_config("EscapeChar ^B")
    with session(server) as screen:
        screen.type("~.\r")
        screen.expect(r"~\.: command not found")
        screen.type("\x02.")
        assert screen.wait() == 255


MODES_ON = r"printf '\033[?1049h\033[?1000h\033[?25lon\n'"


@pytest.mark.parametrize("end", ["~.", signal.SIGTERM])
def test_a_slow_terminal_gets_its_modes_back(server: Server, end: str | int) -> None:
    with session(server, "--command", f"{MODES_ON}; yes") as screen:
        screen.expect("on\r\n")
        # Nobody reads: what comes has to wait.
        time.sleep(0.5)
        if isinstance(end, str):
            screen.type(end)
        else:
            screen.process.send_signal(end)
        assert screen.wait() == (255 if end == "~." else 128 + signal.SIGTERM)
        given_back(screen)


def test_a_terminal_that_stands_still_gets_its_modes_back_later(server: Server) -> None:
    with session(server, "--command", f"{MODES_ON}; yes") as screen:
        screen.expect("on\r\n")
        time.sleep(0.5)
        screen.process.terminate()
        assert screen.process.wait(timeout=10) == 128 + signal.SIGTERM
        assert screen.attributes() == screen.at_start
        deadline = time.monotonic() + 5
        while screen.left_on() and time.monotonic() < deadline:
            time.sleep(0.01)
        given_back(screen)


@pytest.mark.parametrize("through_make", [False, True])
def test_suspending_stops_the_whole_job_and_fg_comes_back(
    server: Server, tmp_path: Path, through_make: bool
) -> None:
    command = " ".join(CLIENT)
    if through_make:
        (tmp_path / "Makefile").write_text(f"ssh:\n\t@{command}\n")
        command = f"make -f {tmp_path}/Makefile ssh"
    with Screen(["bash", "--norc", "--noprofile", "-i"], environment(server)) as screen:
        screen.expect(r"local\$ ")
        screen.type(f"{command}\r")
        plain_shell(screen, server)
        screen.type("\r~\x1a")
        screen.expect(r"\[suspend\]\r\n")
        screen.expect("Stopped")
        screen.expect(r"local\$ ")
        screen.type("echo I am $PPID; stty -a | grep -o ' icanon'\r")
        screen.expect(f"I am {os.getpid()}")
        screen.expect("icanon")
        screen.resize(90, 33)
        screen.type("fg\r")
        # The prompt is drawn again by the far side's shell, as the size has changed.
        screen.expect("there> ")
        screen.type("until stty size | grep '^33 90$'; do :; done; exit 7\r")
        screen.expect(r"\n33 90\r\n")
        screen.expect(r"local\$ ")
        screen.type("echo code=$?\r")
        screen.expect(r"code=2" if through_make else "code=7")
        assert screen.process.poll() is None


def test_a_stop_from_elsewhere_gives_the_terminal_back(server: Server) -> None:
    with Screen(["bash", "--norc", "--noprofile", "-i"], environment(server)) as screen:
        screen.expect(r"local\$ ")
        screen.type(f"{' '.join(CLIENT)}\r")
        plain_shell(screen, server)
        (client,) = _children(screen.process.pid)
        os.kill(client, signal.SIGTSTP)
        screen.expect("Stopped")
        screen.type("fg\r")
        screen.expect("there> ")
        screen.type("exit 5\r")
        screen.expect(r"local\$ ")
        screen.type("echo code=$?\r")
        screen.expect("code=5")


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_closed_window_ends_the_session(server: Server) -> None:
    with session(server) as screen:
        screen.process.send_signal(signal.SIGHUP)
        assert screen.wait() == 129
        given_back(screen)


def test_one_connection_serves_one_command_after_the_other(server: Server) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(CHECKOUT)!r})
from cluster.ssh import config, connection, session
host = config.resolve("server", config={str(server.config)!r})
with connection.connect(host) as c:
    print([session.run(c, f"tty >/dev/null && exit {{n}}", tty=True) for n in range(3)])
    print([session.run(c, "cat; exit 4", tty=False, reads_input=False)])
"""
    with Screen([CLIENT[0], "-c", script], environment(server)) as screen:
        screen.expect(r"\[0, 1, 2\]\r\n\[4\]\r\n")
        assert screen.wait() == 0
        given_back(screen)
