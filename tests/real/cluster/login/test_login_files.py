"""Both backends on a real sshd: scripts whatever the account's login files and ssh_config do."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster import clean_shell
from cluster.login import backends, openssh
from cluster.login.channels import Channels
from cluster.login.openssh import OpenSsh
from cluster.login.transport import Transport
from cluster.site.settings import Ssh
from runfolder.errors import UserError
from tests import waiting
from tests.real.cluster.login.screen import Screen, environment
from tests.real.cluster.login.server import PASSWORD, NewServer, Server
from tests.shared import CHECKOUT

BACKENDS = {"paramiko": Channels, "openssh": OpenSsh}
LOGOUT = "echo logged out; echo logged out >&2; exit 9\n"
# Larger than every buffer on the way, and with what a terminal or a shell would change.
DATA = random.Random(0).randbytes(3_000_000) + b"\r\n\0\x04~.\n"


def settings_of(server: Server) -> Ssh:
    return Ssh(host="server", config=str(server.config))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def account(new_server: NewServer) -> Server:
    """An sshd for this test alone, whose folder is the account's home."""
    return new_server()


def connected(backend: str, server: Server) -> Transport:
    made: Transport = BACKENDS[backend](settings_of(server))
    return made


def test_a_logout_file_and_traps_change_neither_data_nor_codes(
    backend: str, account: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    (account.folder / ".bash_logout").write_text(LOGOUT)
    profile = "echo hello; cd() { echo cd; }; export -f cd; trap 'echo trap; exit 8' EXIT"
    (account.folder / ".bash_profile").write_text(profile)
    with connected(backend, account) as there:
        assert there.ask("cd / && pwd && exit 0") == b"/\n"
        assert there.ask("cat; exit", DATA) == DATA
        with pytest.raises(UserError, match=r"a command failed there: no room$"):
            there.ask("echo no room >&2; exit 4")
        assert there.run("cd / && pwd; exit 6") == 6
        assert capfd.readouterr().out == "/\n"
        # Its stderr comes with it, so that what a profile says is seen, too.
        started = there.start("cat; exit 3")
        started.end()
        assert started.is_over()
        assert started.read_line() == "hello\n"


def test_a_profile_that_replaces_the_shell_is_named_and_the_connection_stands(
    backend: str, account: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    profile = account.folder / ".bash_profile"
    profile.write_text("exec dash")
    with connected(backend, account) as there:
        for _ in range(2):
            with pytest.raises(UserError, match=rf"^server: .*\({profile}, or /etc/profile\)"):
                there.ask("touch ran")
        assert there.run("touch ran") == 2
        assert f"({profile}, or /etc/profile)" in capfd.readouterr().err
        assert not (account.folder / "ran").exists()
        profile.unlink()
        assert there.ask("echo $((6 * 7))") == b"42\n"


def test_a_profile_that_hangs_is_named_at_once_and_given_up(
    backend: str,
    account: Server,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    profile = account.folder / ".bash_profile"
    os.mkfifo(account.folder / "pipe")
    profile.write_text(f"read -r x <{account.folder}/pipe")
    quick = functools.partial(clean_shell.command, slow_s=0.1, limit_s=0.1)
    monkeypatch.setattr(clean_shell, "command", quick)
    with connected(backend, account) as there:
        with pytest.raises(UserError, match=rf"\({profile}, .*\) did not finish"):
            there.ask("echo ran")
        [note] = [line for line in capfd.readouterr().err.splitlines() if "not finished" in line]
        assert note.startswith("note: ") and str(profile) in note


def test_what_a_login_file_leaves_running_holds_up_no_answer(
    backend: str, account: Server, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (account.folder / ".bash_profile").write_text(f"{{ read -r x; }} <>{tmp_path}/pipe &\n")
    with connected(backend, account) as there:
        assert there.ask("echo answer") == b"answer\n"
    (tmp_path / "pipe").write_text("\n")


def test_a_bashrc_that_replaces_the_accounts_shell_is_said(
    backend: str, new_server: NewServer
) -> None:
    """In a shell that sshd starts, bash reads it although nobody types."""
    # Whatever the shell is of the account that runs these tests.
    account = new_server('ForceCommand exec bash -c "$SSH_ORIGINAL_COMMAND"')
    (account.folder / ".bashrc").write_text("echo before; exec dash")
    with (
        connected(backend, account) as there,
        pytest.raises(UserError, match=r"bash could not be started there: before; .*bashrc"),
    ):
        there.ask("touch ran")


# ---- the ssh command ----


def make_ssh(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `make ssh` with the ssh command, on a server."""
    site = server.folder / "site.toml"
    site.write_text(
        '[slurm]\npartition = "x"\ncpus_per_node = 1\ngpus_per_node = 0\n'
        '[paths]\nscratch = "/tmp"\n[ssh]\nhost = "server"\nbackend = "openssh"\n'
        f'config = "{server.config}"\n'
    )
    return waiting.run(
        [sys.executable, "-m", "cluster", "ssh", *words],
        cwd=CHECKOUT,
        env=os.environ | {"SLUICE_SITE": str(site)},
    )


# What a command from a laptop does, in a terminal.
ASK = """
from cluster.errors import run_to_exit
from cluster.login.backends import connect
from cluster.site.file import load_site
def main(argv):
    with connect(load_site()) as there:
        for word in ("one", "two"):
            print(there.ask(f"echo {word} $((6 * 7))").decode(), end="")
    return 0
run_to_exit(main)
"""


@pytest.mark.needs("root")
def test_ssh_itself_asks_for_the_password_once_and_its_own_backend_is_not_needed(
    new_server: NewServer,
) -> None:
    server = new_server(password=True)
    server.write_config(key=False)
    with Screen([sys.executable, "-c", ASK], environment(server)) as screen:
        screen.expect("password: ")
        waiting.wait_until(lambda: not screen.attributes()[3] & termios.ECHO, "silence")
        screen.type(f"{PASSWORD}\n")
        screen.expect(r"one 42\r\ntwo 42\r\n")
        assert screen.wait() == 0
        assert screen.attributes() == screen.at_start
    assert server.log.count("Accepted password") == 1
    assert PASSWORD.encode() not in screen.shown


def test_without_ssh_the_same_goes_through_python(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "leave_on_signals", lambda: None)
    site = SimpleNamespace(ssh=settings_of(server))
    with backends.connect(cast(Any, site)) as there:
        assert isinstance(there, OpenSsh)
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if "ssh" in name else real(name))
    with backends.connect(cast(Any, site)) as there:
        assert isinstance(there, Channels)
        assert there.ask("cat", DATA) == DATA


FOR_PEOPLE = ("RemoteCommand echo for people", "RequestTTY force", "StdinNull yes")


@pytest.mark.parametrize("line", [*FOR_PEOPLE, "SessionType none", "ForkAfterAuthentication yes"])
def test_what_ssh_config_has_for_people_spoils_no_command(line: str, server: Server) -> None:
    server.write_config(line)
    with connected("openssh", server) as there:
        assert there.ask("cat", DATA) == DATA
        assert there.run("exit 5") == 5


def test_a_command_goes_before_the_remote_command_of_ssh_config(server: Server) -> None:
    server.write_config("RemoteCommand echo for people")
    done = make_ssh(server, "--command", "echo mine; exit 3")
    assert (done.returncode, done.stdout) == (3, "mine\n")
    assert make_ssh(server).stdout == "for people\n"
    # As with ssh, so with Sluice's own client.
    site = server.folder / "site.toml"
    site.write_text(site.read_text().replace("openssh", "paramiko"))
    done = waiting.run(
        [sys.executable, "-m", "cluster", "ssh"],
        cwd=CHECKOUT,
        env=os.environ | {"SLUICE_SITE": str(site)},
    )
    assert done.stdout == "for people\n"


@contextmanager
def own_master(server: Server, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Have the user's own connection open, as ControlMaster would."""
    server.write_config(f"ControlPath {folder}/master")
    words = ["ssh", "-F", server.config, "-M", "-N", "server"]
    master = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    try:
        waiting.wait_until((folder / "master").exists, "a master")
        yield master
    finally:
        # What a test has stopped.
        server.send_children(signal.SIGCONT)
        master.send_signal(signal.SIGCONT)
        master.terminate()
        master.wait()


@pytest.mark.parametrize("dead", ["the connection", "the process"])
def test_a_master_that_does_not_answer_is_left_aside_and_said(
    dead: str,
    account: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with own_master(account, tmp_path) as master:
        with connected("openssh", account) as there:
            assert there.ask("echo as it is") == b"as it is\n"
        assert account.log.count("Accepted publickey") == 1
        monkeypatch.setattr(openssh, "MASTER_S", 1)
        if dead == "the process":
            master.send_signal(signal.SIGSTOP)
        else:
            account.send_children(signal.SIGSTOP)
        with connected("openssh", account) as there:
            assert "ControlMaster" in capfd.readouterr().err
            assert there.ask("echo another") == b"another\n"
        assert account.log.count("Accepted publickey") == 2
