"""The client without a terminal: pipes, files, exit codes, and how a session is lost."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.real.cluster.login.screen import CLIENT, Screen, environment
from tests.real.cluster.login.server import NewServer, Server
from tests.shared import CHECKOUT

pytestmark = pytest.mark.needs("sshd")
PIPE = subprocess.PIPE
PIPES = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE}
Process = subprocess.Popen[bytes]

# A command that reads nothing, and ends with its connection.
WAITS = "echo started; tail --pid=$PPID -f /dev/null"


def start(server: Server, command: str, **variables: str) -> Process:
    """Start a command there, or a shell if it is empty."""
    words = [*CLIENT, *(["--command", command] if command else [])]
    variables = environment(server, **variables)
    return subprocess.Popen(
        words, cwd=CHECKOUT, env=variables, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )


def ended(process: Process, given: bytes = b"") -> tuple[int, bytes, bytes]:
    """Return how it ends, and all that it says."""
    out, errors = process.communicate(given)
    return process.returncode, out, errors


def run(server: Server, command: str, given: bytes = b"", **more: str) -> tuple[int, bytes, bytes]:
    return ended(start(server, command, **more), given)


def test_a_command_and_a_variable_need_not_be_utf8(server: Server) -> None:
    server.write_config("SendEnv SLUICE_WORD")
    word = os.fsdecode(b"\xff\xfe")
    done = run(server, f"printf '{word} %s' \"$SLUICE_WORD\"", SLUICE_WORD=word)
    assert done == (0, b"\xff\xfe \xff\xfe", b"")


@pytest.mark.parametrize("code", [0, 255])
def test_the_exit_code_is_the_commands_and_nothing_is_added(server: Server, code: int) -> None:
    done = run(server, f"echo out; echo err >&2; printf last; exit {code}")
    assert done == (code, b"out\nlast", b"err\n")


def test_death_by_a_signal_is_told(server: Server) -> None:
    said = b"server: it ended without an exit code, as if killed by a signal\n"
    assert run(server, "echo before; kill -TERM $$") == (255, b"before\n", said)


def test_every_byte_passes_and_output_goes_on_after_the_input_has_ended(server: Server) -> None:
    # Also what would be an escape in a terminal.
    given = bytes(range(256)) * 300 + b"\n~.\n"
    done = run(server, "cat; echo the end >&2; exit 3", given)
    assert done == (3, given, b"the end\n")


def test_without_a_command_the_input_is_the_shells(server: Server) -> None:
    code, out, _ = run(server, "", b"tty; echo $((6 * 7)); exit 9\n")
    assert code == 9 and out.endswith(b"not a tty\n42\n")


def test_closed_streams_are_no_trouble(server: Server) -> None:
    script = 'exec "$@" -m cluster ssh --command "cat; echo done; exit 6" <&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable],
        cwd=CHECKOUT,
        env=environment(server),
        stdout=PIPE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (6, b"done\n")


def test_a_reader_that_leaves_ends_it(server: Server) -> None:
    process = start(server, "yes; exit 3")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(2) == b"y\n"
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, b"")


def test_a_reader_of_errors_that_leaves_does_not_hold_it_up(server: Server) -> None:
    # More than the window has room for.
    process = start(server, "echo >&2; head -c 5000000 /dev/zero >&2; exit 3")
    assert process.stderr is not None
    assert process.stderr.read(1) == b"\n"
    process.stderr.close()
    assert process.wait() == 3


# ---- much -----------------------------------------------------------------------------------

MEGABYTE = 1_000_000
LARGE = 40 * MEGABYTE


def test_a_server_that_makes_new_keys_holds_nothing_up(new_server: NewServer) -> None:
    server = new_server("RekeyLimit 1M")
    given = random.Random(0).randbytes(8 * MEGABYTE)
    assert run(server, "cat", given) == (0, given, b"")
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


def test_a_server_that_is_killed(new_server: NewServer) -> None:
    server = new_server()
    process = start(server, WAITS)
    assert process.stdout is not None and process.stdout.readline() == b"started\n"
    server.send_children(signal.SIGKILL)
    said = b"server: the connection was lost: server closed the connection"
    code, _, errors = ended(process)
    assert (code, errors.count(b"\n")) == (255, 1) and errors.startswith(said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it(server: Server, number: signal.Signals) -> None:
    process = start(server, WAITS)
    assert process.stdout is not None and process.stdout.readline() == b"started\n"
    process.send_signal(number)
    assert ended(process) == (128 + number, b"", b"")


# ---- what a server refuses or says ----------------------------------------------------------


def test_a_key_without_a_terminal(new_server: NewServer) -> None:
    server = new_server()
    key = server.authorized_keys.read_text()
    server.authorized_keys.write_text(f"no-pty {key}")
    with Screen(CLIENT, environment(server)) as screen:
        assert screen.wait() == 2
        screen.expect("error: server: the server refuses a terminal")
        assert screen.attributes() == screen.at_start
    assert run(server, "echo fine") == (0, b"fine\n", b"")


def test_an_agent_is_not_lent_and_that_is_said(server: Server) -> None:
    server.write_config("ForwardAgent yes")
    code, out, errors = run(server, "echo out")
    assert (code, out, errors.count(b"\n")) == (0, b"out\n", 1)
    assert errors.startswith(b"note: ForwardAgent ")


def test_a_site_without_a_host_is_said(server: Server, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text((CHECKOUT / "configs/site.example.toml").read_text())
    code, _, errors = run(server, "true", SLUICE_SITE=str(site))
    assert (code, errors.count(b"\n")) == (2, 1)
    assert errors.startswith(b"error: ssh: no host is set; set host in [ssh] of site.toml")
