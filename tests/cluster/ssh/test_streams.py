"""The real client without a terminal: pipes, files, exit codes, and how a session is lost."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.cluster.ssh.screen import CLIENT, Screen, environment
from tests.cluster.ssh.server import NewServer, Server, keygen
from tests.conftest import CHECKOUT

pytestmark = pytest.mark.needs("sshd")

Result = subprocess.CompletedProcess[bytes]
MEGABYTE = 1_000_000
LARGE = 200 * MEGABYTE
# What the memory may grow by from one megabyte to two hundred: the window, both ways, and slack.
GROWTH_KB = 16_000


def client(
    server: Server, command: str, *options: str, given: bytes = b"", **variables: str
) -> Result:
    """Run a command there, or a shell if it is empty, with `given` as its input."""
    return subprocess.run(
        [*CLIENT, *options, *(["--command", command] if command else [])],
        input=given,
        cwd=CHECKOUT,
        env=environment(server, **variables),
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_a_command_and_a_variable_need_not_be_utf8(new_server: NewServer) -> None:
    server = new_server()
    server.write_config("SendEnv SLUICE_WORD")
    word = os.fsdecode(b"\xff\xfe")
    done = client(server, f"printf '{word} %s' \"$SLUICE_WORD\"", SLUICE_WORD=word)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\xff\xfe \xff\xfe", b"")


@pytest.mark.parametrize("code", [0, 1, 130, 255])
def test_the_exit_code_is_the_commands(server: Server, code: int) -> None:
    done = client(server, f"exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


@pytest.mark.parametrize("name", ["TERM", "KILL", "SEGV"])
def test_death_by_a_signal_is_told(server: Server, name: str) -> None:
    done = client(server, f"echo before; ulimit -c 0; kill -{name} $$")
    assert done.returncode == 128 + getattr(signal, f"SIG{name}")
    assert done.stdout == b"before\n"
    assert done.stderr == f"server: it was ended by signal {name}\n".encode()


def test_output_and_errors_are_apart_and_nothing_is_added(server: Server) -> None:
    done = client(server, "echo out; echo err >&2; printf last")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\nlast", b"err\n")


def test_every_byte_passes_and_the_end_of_the_input_does(server: Server) -> None:
    # Also what would be escapes in a terminal.
    given = bytes(range(256)) * 300 + b"\n~.\n~?\n"
    done = client(server, "cat; echo the end >&2", given=given)
    assert (done.returncode, done.stdout, done.stderr) == (0, given, b"the end\n")


def test_output_goes_on_after_the_input_has_ended(server: Server) -> None:
    done = client(server, "cat >/dev/null; sleep 0.2; seq 30000; exit 3", given=b"x")
    assert done.returncode == 3
    assert done.stdout.endswith(b"\n30000\n") and len(done.stdout.splitlines()) == 30000


def test_without_a_command_the_input_is_the_shells(server: Server) -> None:
    done = client(server, "", given=b"tty; echo $((6 * 7)); exit 9\n")
    assert done.returncode == 9
    assert done.stdout.endswith(b"not a tty\n42\n")


def test_closed_streams_are_no_trouble(server: Server) -> None:
    script = 'exec "$@" -m cluster.ssh --command "cat; echo done; exit 6" <&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable],
        cwd=CHECKOUT,
        env=environment(server),
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (6, b"done\n")


def test_a_reader_that_leaves_ends_it(server: Server) -> None:
    script = '"$@" -m cluster.ssh --command "yes; exit 3" | head -n 1; echo ${PIPESTATUS[0]}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable],
        cwd=CHECKOUT,
        env=environment(server),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == (b"y\n141\n", b"")


@pytest.mark.parametrize("reader", ["exit", "sleep 1"])
def test_a_reader_of_errors_that_leaves_does_not_hold_it_up(server: Server, reader: str) -> None:
    # More errors than the window has room for.
    command = "head -c 5000000 /dev/zero >&2; exit 3"
    script = f'"$@" -m cluster.ssh --command "{command}" 2> >({reader})'
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable],
        cwd=CHECKOUT,
        env=environment(server),
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3


# ---- much -----------------------------------------------------------------------------------


def numbers(size: int) -> Iterator[bytes]:
    """Yield what `seq` prints, `size` bytes of it, in pieces."""
    source = subprocess.Popen(["seq", "100000000"], stdout=subprocess.PIPE)
    assert source.stdout is not None
    while size and (data := source.stdout.read(min(size, 1 << 16))):
        size -= len(data)
        yield data
    source.kill()
    source.wait()
    source.stdout.close()


# In a process of its own: a child counts what its parent had when it was started.
PEAK = """
import pathlib, resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
pathlib.Path(sys.argv[1]).write_text(str(peak))
sys.exit(code)
"""


def peak_of(server: Server, words: list[str], **streams: IO[bytes] | int) -> int:
    """Run a command that has to succeed; return the most memory that it had, in kB."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-c", PEAK, file.name, *words]
        subprocess.run(command, check=True, cwd=CHECKOUT, env=environment(server), **streams)
        return int(Path(file.name).read_text())


def transfer(server: Server, command: str, source: IO[bytes] | int, sink: IO[bytes] | int) -> int:
    """Run a command there; return the most memory that the client had, in kB."""
    return peak_of(server, [*CLIENT, "--command", command], stdin=source, stdout=sink)


def test_200_mb_of_output_pass_with_flat_memory(server: Server, tmp_path: Path) -> None:
    peaks = []
    for size in (MEGABYTE, LARGE):
        with subprocess.Popen(["md5sum"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as checker:
            assert checker.stdin is not None and checker.stdout is not None
            command = f"seq 100000000 | head -c {size}"
            peaks.append(transfer(server, command, subprocess.DEVNULL, checker.stdin))
            checker.stdin.close()
            found = checker.stdout.read()
        assert found.split()[0].decode() == digest(size)
    assert peaks[1] - peaks[0] < GROWTH_KB, peaks


def test_200_mb_of_input_pass_with_flat_memory(server: Server, tmp_path: Path) -> None:
    peaks = []
    for size in (MEGABYTE, LARGE):
        script = f"seq 100000000 | head -c {size}"
        with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as source:
            assert source.stdout is not None
            file = tmp_path / "sum"
            peaks.append(transfer(server, f"md5sum > {file}", source.stdout, subprocess.DEVNULL))
        assert file.read_text().split()[0] == digest(size)
    assert peaks[1] - peaks[0] < GROWTH_KB, peaks


def digest(size: int) -> str:
    """Return the MD5 of `numbers(size)`."""
    summed = hashlib.md5()
    for data in numbers(size):
        summed.update(data)
    return summed.hexdigest()


def test_nobody_reads_and_the_memory_stays_flat_both_ways(server: Server) -> None:
    """Output that nobody takes, and input that the far side does not take."""
    for command, ours in (("yes", "</dev/zero | sleep 2"), ("sleep 2", "</dev/zero >/dev/null")):
        script = f'"$@" -m cluster.ssh --command "{command}" {ours}'
        # `|` and `;`: the last command's code is not the client's.
        words = ["bash", "-c", f"{script}; true", "bash", sys.executable]
        # Paramiko itself, the window, what waits to be sent.
        assert peak_of(server, words, stderr=subprocess.DEVNULL) < 90_000


# ---- how it is lost -------------------------------------------------------------------------


def started(server: Server, command: str) -> subprocess.Popen[bytes]:
    """Start a command there; returns when it has said so."""
    process = subprocess.Popen(
        [*CLIENT, "--command", f"echo started; {command}"],
        cwd=CHECKOUT,
        env=environment(server),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    return process


def test_a_server_that_is_killed(new_server: NewServer) -> None:
    server = new_server()
    process = started(server, "sleep 100")
    os.kill(server.children()[0], signal.SIGKILL)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 255
    assert said.startswith(b"server: the connection was lost: server closed the connection")
    assert said.count(b"\n") == 1


def test_a_server_that_answers_no_more(new_server: NewServer) -> None:
    server = new_server()
    server.write_config("ServerAliveInterval 1", "ServerAliveCountMax 2")
    process = started(server, "sleep 100")
    (child,) = server.children()
    os.kill(child, signal.SIGSTOP)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 255
    assert re.fullmatch(rb"server: the connection was lost: no answer from server for \d s\n", said)


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_a_signal_ends_it(server: Server, name: str) -> None:
    process = started(server, "sleep 100")
    process.send_signal(getattr(signal, f"SIG{name}"))
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + getattr(signal, f"SIG{name}")
    assert said == b""


def test_a_dead_peer_does_not_hold_up_a_signal(new_server: NewServer) -> None:
    server = new_server()
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" </dev/zero', "sh", *CLIENT, "--command", "cat >/dev/null"],
        cwd=CHECKOUT,
        env=environment(server),
    )
    while not server.children():
        time.sleep(0.05)
    time.sleep(1)
    os.kill(server.children()[0], signal.SIGSTOP)
    time.sleep(0.5)
    process.terminate()
    assert process.wait(timeout=10) == 143


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


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """Return the socket of an empty ssh-agent."""
    path = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    while not path.exists():
        assert process.poll() is None
    yield str(path)
    process.terminate()
    process.wait()


def test_the_agent_is_lent_only_if_asked(new_server: NewServer, tmp_path: Path, agent: str) -> None:
    server = new_server()
    server.write_config(f"IdentityAgent {agent}")
    keygen(tmp_path / "lent")
    subprocess.run(
        ["ssh-add", "-q", tmp_path / "lent"],
        env=os.environ | {"SSH_AUTH_SOCK": agent},
        check=True,
        capture_output=True,
    )
    command = "ssh-add -l 2>&1"
    assert b"lent" not in client(server, command).stdout
    done = client(server, command, "--forward-agent")
    assert done.stdout.rstrip().endswith(b"lent (ED25519)"), done


def test_no_agent_to_lend_is_said(server: Server) -> None:
    done = client(server, "true", "--forward-agent")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ") and b"agent" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_site_without_a_host_is_said(server: Server, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text((CHECKOUT / "configs/site.example.toml").read_text())
    done = client(server, "true", SLUICE_SITE=str(site))
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ssh: no host is named; set host in [ssh] of site.toml")
