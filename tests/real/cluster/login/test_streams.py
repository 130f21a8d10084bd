"""The client without a terminal: pipes, files, exit codes, and how a session is lost."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.real.cluster.login.screen import CLIENT, Screen, environment
from tests.real.cluster.login.server import NewServer, Server
from tests.real.cluster.login.standard import client, exit_code, standard_pipes, when_heeded
from tests.shared import CHECKOUT
from tests.waiting import wait_until

pytestmark = pytest.mark.needs("sshd")

# A command that reads nothing, and ends with its connection.
WAITS = "tail --pid=$PPID -f /dev/null"


def test_a_command_and_a_variable_need_not_be_utf8(server: Server) -> None:
    server.write_config("SendEnv SLUICE_WORD")
    word = os.fsdecode(b"\xff\xfe")
    done = client(server, f"printf '{word} %s' \"$SLUICE_WORD\"", SLUICE_WORD=word)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\xff\xfe \xff\xfe", b"")


@pytest.mark.parametrize("code", [0, 1, 130, 255])
def test_the_exit_code_is_the_commands_and_nothing_is_added(server: Server, code: int) -> None:
    done = client(server, f"echo out; echo err >&2; printf last; exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, b"out\nlast", b"err\n")


def test_death_by_a_signal_is_told(server: Server) -> None:
    done = client(server, "echo before; kill -TERM $$")
    assert (done.returncode, done.stdout) == (255, b"before\n")
    assert done.stderr == b"server: it ended without an exit code, as by a signal\n"


def test_every_byte_passes_and_the_end_of_the_input_does(server: Server) -> None:
    # Also what would be escapes in a terminal.
    given = bytes(range(256)) * 300 + b"\n~.\n~?\n"
    done = client(server, "cat; echo the end >&2", given=given)
    assert (done.returncode, done.stdout, done.stderr) == (0, given, b"the end\n")


def test_output_goes_on_after_the_input_has_ended(server: Server) -> None:
    done = client(server, "cat >/dev/null; seq 30000; exit 3", given=b"x")
    assert done.returncode == 3
    assert done.stdout.endswith(b"\n30000\n") and len(done.stdout.splitlines()) == 30000


def test_without_a_command_the_input_is_the_shells(server: Server) -> None:
    done = client(server, "", given=b"tty; echo $((6 * 7)); exit 9\n")
    assert done.returncode == 9
    assert done.stdout.endswith(b"not a tty\n42\n")


def test_closed_streams_are_no_trouble(server: Server) -> None:
    script = 'exec "$@" -m cluster.login --command "cat; echo done; exit 6" <&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable],
        cwd=CHECKOUT,
        env=environment(server),
        stdout=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (6, b"done\n")


def test_a_reader_that_leaves_ends_it(server: Server) -> None:
    with standard_pipes() as (given, out, errors):
        given.leave()
        out.in_background(out.take_some)
        errors.in_background(errors.take)
        assert exit_code(server, "--command", "yes; exit 3") == 141
    assert out.data.startswith(b"y\n") and errors.data == b""


@pytest.mark.parametrize("is_full", [False, True], ids=["at once", "full"])
def test_a_reader_of_errors_that_leaves_does_not_hold_it_up(server: Server, is_full: bool) -> None:
    with standard_pipes() as (given, _, errors):
        given.leave()
        errors.in_background(errors.leave_when_full if is_full else errors.leave)
        # More than the window has room for.
        assert exit_code(server, "--command", "head -c 5000000 /dev/zero >&2; exit 3") == 3


# ---- much -----------------------------------------------------------------------------------

MEGABYTE = 1_000_000
LARGE = 40 * MEGABYTE


def test_a_server_that_makes_new_keys_holds_nothing_up(new_server: NewServer) -> None:
    server = new_server("RekeyLimit 1M")
    given = random.Random(0).randbytes(8 * MEGABYTE)
    assert client(server, "cat", given=given).stdout == given
    assert server.log.count("SSH2_MSG_NEWKEYS received") > 8


# What the memory may grow by from one megabyte to forty: the window, both ways, and slack.
GROWTH_KB = 16_000
# In a process of its own: a child counts what its parent had when it was started.
PEAK = """
import pathlib, resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
pathlib.Path(sys.argv[1]).write_text(str(peak))
sys.exit(code)
"""


def test_much_passes_both_ways_with_flat_memory(server: Server, tmp_path: Path) -> None:
    peaks = []
    for size in (MEGABYTE, LARGE):
        # Of blocks that differ: one that is lost, or twice there, is seen.
        blocks = [number.to_bytes(8, "big") * (1 << 13) for number in range(size >> 16)]
        process = subprocess.Popen(
            [sys.executable, "-c", PEAK, tmp_path / "peak", *CLIENT, "--command", "cat"],
            cwd=CHECKOUT,
            env=environment(server),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

        def feed(target: Any, blocks: list[bytes]) -> None:
            for block in blocks:
                target.write(block)
            target.close()

        feeder = threading.Thread(target=feed, args=(process.stdin, blocks))
        feeder.start()
        assert process.stdout is not None
        found, expected = hashlib.sha256(), hashlib.sha256()
        while data := process.stdout.read(1 << 16):
            found.update(data)
        for block in blocks:
            expected.update(block)
        feeder.join()
        assert process.wait() == 0
        assert found.digest() == expected.digest()
        peaks.append(int((tmp_path / "peak").read_text()))
    assert peaks[1] - peaks[0] < GROWTH_KB, peaks


# ---- how it is lost -------------------------------------------------------------------------


def ended(server: Server, end: Callable[[], None]) -> tuple[int, bytes]:
    """Return how a command ends that waits, and what is said, if `end` is called meanwhile."""
    with standard_pipes() as (given, out, errors):

        def end_it() -> None:
            wait_until(lambda: out.data == b"started\n", "the command to start", every_s=0.01)
            end()

        given.leave()
        out.in_background(out.take, end_it)
        errors.in_background(errors.take)
        code = exit_code(server, "--command", f"echo started; {WAITS}")
    return code, errors.data


def test_a_server_that_is_killed(new_server: NewServer) -> None:
    server = new_server()
    code, said = ended(server, lambda: server.send_children(signal.SIGKILL))
    assert code == 255
    assert said.startswith(b"server: the connection was lost: server closed the connection")
    assert said.count(b"\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it(server: Server, number: signal.Signals) -> None:
    assert ended(server, when_heeded(number)) == (128 + number, b"")


# ---- what a server refuses or says ----------------------------------------------------------


def test_a_banner_goes_to_stderr(new_server: NewServer, tmp_path: Path) -> None:
    (tmp_path / "banner").write_text("Authorized \033[31muse only\n")
    server = new_server(f"Banner {tmp_path}/banner")
    done = client(server, "echo out")
    assert done.stdout == b"out\n"
    assert b"use only" in done.stderr and b"\033" not in done.stderr


def test_a_key_without_a_terminal(new_server: NewServer) -> None:
    server = new_server()
    key = server.authorized_keys.read_text()
    server.authorized_keys.write_text(f"no-pty {key}")
    with Screen(CLIENT, environment(server)) as screen:
        assert screen.wait() == 2
        screen.expect("error: server: the server gives no terminal")
        assert screen.attributes() == screen.at_start
    assert client(server, "echo fine").stdout == b"fine\n"


def test_an_agent_is_not_lent_and_that_is_said(server: Server) -> None:
    done = client(server, "true", "--forward-agent")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: --forward-agent: ") and b"openssh" in done.stderr
    assert done.stderr.count(b"\n") == 1
    server.write_config("ForwardAgent yes")
    done = client(server, "echo out")
    assert done.stdout == b"out\n"
    assert done.stderr.startswith(b"note: ForwardAgent ") and done.stderr.count(b"\n") == 1


def test_a_site_without_a_host_is_said(server: Server, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text((CHECKOUT / "configs/site.example.toml").read_text())
    done = client(server, "true", SLUICE_SITE=str(site))
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ssh: no host is named; set host in [ssh] of site.toml")
