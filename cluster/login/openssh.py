"""Commands on a login node with the `ssh` command, if it is installed.

One process signs in and stays (ControlMaster); all else goes through it. A master that the user
already has is used as it is, if it answers.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cluster import clean_shell
from cluster.login.settings import by_ssh
from cluster.login.transport import LOST, Running, Stream, to_stderr
from cluster.site.settings import Ssh
from runfolder.errors import UserError

# How long a script there may take to end once its input has.
END_S = 60
# How long the user's own master may take to answer.
MASTER_S = 15
# What ssh prints on this side after signing in, so that no remote login file is involved.
SIGNED_IN = "-- sluice --"
# Once there is a master, nothing prompts, even if the master is lost.
QUIET = ["-o", "ControlMaster=no", "-o", "BatchMode=yes"]
# Settings of ssh_config for people, which would keep a command from running, or from its input.
# Only those that ssh_config changes are passed: releases before 8.7 do not know them.
FOR_COMMANDS = {"sessiontype": "default", "stdinnull": "no", "forkafterauthentication": "no"}


def words_of(settings: Ssh) -> list[str]:
    """Return the ssh command of a site, up to the host; a `UserError` if there is none."""
    if shutil.which("ssh") is None:
        raise UserError('ssh.backend = "openssh": ssh is not on the PATH')
    words = ["ssh", *(["-F", settings.config] if settings.config else [])]
    words += ["-l", settings.user] if settings.user else []
    return words + (["-p", str(settings.port)] if settings.port else [])


def for_commands(words: Sequence[str], host: str) -> list[str]:
    """Return `words` (`words_of`) with the options that are needed to run a command as it is."""
    words = [*words, "-o", "RemoteCommand=none"]
    settings = by_ssh(words[1:], host, "exit")
    for name, plain in FOR_COMMANDS.items():
        if settings.get(name, [plain]) != [plain]:
            words += ["-o", f"{name}={plain}"]
    return words


def master_of(words: Sequence[str], host: str) -> Literal["none", "alive", "dead"]:
    """Return the state of the user's own master; says so if it is not used.

    Its process may still run when its connection is dead, as on a laptop that was moved.
    """
    state = _outcome([*words, "-O", "check", host])
    if state == "alive":
        # Whatever the remote side does with it: if it ends, the connection works.
        state = _outcome([*for_commands(words, host), "-T", *QUIET, host, "exit"])
        state = "alive" if state == "none" else state
    if state == "dead":
        to_stderr(
            f"note: {host}: the open connection (ControlMaster) did not answer in {MASTER_S} s, "
            f"and is not used; to end it: ssh -O exit {host}"
        )
    return state


def _outcome(command: list[str]) -> Literal["none", "alive", "dead"]:
    null = subprocess.DEVNULL
    try:
        code = subprocess.call(command, stdin=null, stdout=null, stderr=null, timeout=MASTER_S)
    except subprocess.TimeoutExpired:
        return "dead"
    return "none" if code else "alive"


class OpenSsh:
    """A `cluster.login.transport.Transport`."""

    def __init__(self, settings: Ssh) -> None:
        self._host = settings.host
        # Nor port forwardings that are meant for a terminal.
        self._words = for_commands(words_of(settings), self._host)
        self._words += ["-o", "ClearAllForwardings=yes"]
        self._master: subprocess.Popen[bytes] | None = None
        self._is_ending = False
        # In /tmp, because the path of a socket must be short.
        self._folder = Path(tempfile.mkdtemp(prefix="sluice-", dir="/tmp"))

    def __enter__(self) -> OpenSsh:
        try:
            self._sign_in()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def lost(self) -> str:
        """Why the connection is gone; see `Transport`."""
        if self._master is not None:
            stands = self._master.poll() is None
        else:
            stands = _outcome([*self._words, "-O", "check", self._host]) == "alive"
        return "" if stands else "ssh has ended"

    def _sign_in(self) -> None:
        if master_of(self._words, self._host) == "alive":
            self._words += QUIET
            return
        self._words += ["-o", f"ControlPath={self._folder}/socket"]
        words = [*self._words, "-T", "-o", "ControlMaster=yes", "-o", "ControlPersist=no"]
        words += ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"]
        words += ["-o", "PermitLocalCommand=yes", "-o", f"LocalCommand=echo {SIGNED_IN}"]
        # Ends with this process, however that ends: cat, or what a login file has put in its place,
        # then finds no more input.
        self._master = subprocess.Popen(
            [*words, self._host, "exec cat >/dev/null"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._master.stdout is not None
        for line in self._master.stdout:
            if line.strip().endswith(SIGNED_IN.encode()):
                break
        else:
            self._master.wait()
            raise UserError(f"{self._host}: ssh could not sign in; its own message is above")
        self._words += QUIET

    def _end(self) -> None:
        self._is_ending = True
        try:
            if self._master is not None:
                self._master.terminate()
                self._master.wait()
        finally:
            shutil.rmtree(self._folder)

    def ask(self, script: str, data: bytes = b"") -> bytes:
        """Run a bash script there; see `Transport`."""
        answer = clean_shell.Answer.of(script)
        pipe = subprocess.PIPE
        words = [*self._words, "-T", self._host, clean_shell.command(answer.script)]
        with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) as process:
            given, output, errors = process.stdin, process.stdout, process.stderr
            assert given and output and errors

            def send() -> None:
                # It may end, or be closed as the answer is complete; the reader finds out why.
                with contextlib.suppress(OSError, ValueError):
                    view = memoryview(data)
                    while view:
                        view = view[given.write(view) :]
                    given.close()

            try:
                answer.collect(send, output.read, errors.read)
                code = process.wait() if answer.code is None else 0
            finally:
                process.kill()
        if code == LOST and self.lost:
            raise UserError(f"{self._host}: the connection was lost: {self.lost}; try again")
        return answer.words(self._host, code)

    def run(self, script: str, modules: Sequence[str] = ()) -> int:
        """Run a bash script there, with these streams; see `Transport`."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        command = clean_shell.command(script, modules)
        words = [*self._words, "-t" if interactive else "-T", self._host, command]
        stdin = None if interactive else subprocess.DEVNULL
        return subprocess.call(words, stdin=stdin)

    def start(self, script: str, modules: Sequence[str] = ()) -> Running:
        """Run a bash script there, beside others; see `Transport`."""
        return _Process([*self._words, "-T", self._host, clean_shell.command(script, modules)])

    def dial(self, host: str, port: int) -> Stream:
        """Return a stream to a port there; if nothing listens there, that is reported later."""
        ours, theirs = socket.socketpair()
        words = [*self._words, "-W", f"[{host}]:{port}", self._host]
        process = subprocess.Popen(
            words, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.DEVNULL
        )

        def wait() -> None:
            # The stream ends when that is reported.
            with theirs:
                if process.wait() and not self._is_ending:
                    to_stderr(
                        f"error: {host}:{port}: nothing accepts connections on port {port} of "
                        f"{host} from {self._host}, or sshd there does not forward ports"
                    )

        threading.Thread(target=wait, daemon=True).start()
        return ours


class _Process:
    """A `cluster.login.transport.Running`."""

    def __init__(self, words: list[str]) -> None:
        pipe = subprocess.PIPE
        # Only these lines are read here.
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)

    def read_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode(errors="replace")

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
