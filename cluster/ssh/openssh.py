"""The way to a login node by the `ssh` command, for what Paramiko lacks: Kerberos, security keys.

One process signs in and stays (ControlMaster); all else goes through it. A master that the user has
already is used as it is.
"""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from cluster.errors import UserError
from cluster.site import Ssh
from cluster.transport import LOST, MARK, Running, Stream, answer, command, marked

# What a script there gets to end once its input has.
END_S = 60


def words_of(settings: Ssh) -> list[str]:
    """Return the ssh command of a site, as far as the name of the host."""
    words = ["ssh"]
    if settings.config:
        words += ["-F", settings.config]
    if settings.user:
        words += ["-l", settings.user]
    if settings.port:
        words += ["-p", str(settings.port)]
    return words


class OpenSsh:
    """A `cluster.transport.Transport`."""

    def __init__(self, settings: Ssh) -> None:
        self._host = settings.host
        # Of what ssh_config says, not a command and ports that are meant for a terminal.
        self._words = [*words_of(settings), "-o", "RemoteCommand=none"]
        self._words += ["-o", "ClearAllForwardings=yes"]
        self._master: subprocess.Popen[bytes] | None = None
        # In /tmp, because the path of a socket may not be long.
        self._folder = Path(tempfile.mkdtemp(prefix="sluice-", dir="/tmp"))

    def __enter__(self) -> OpenSsh:
        try:
            self._sign_in()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def lost(self) -> str:
        """Why there is no connection any more; see `Transport`."""
        master = self._master
        stands = self._has_master() if master is None else master.poll() is None
        return "" if stands else "ssh has ended"

    def _has_master(self) -> bool:
        words = [*self._words, "-O", "check", self._host]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    def _sign_in(self) -> None:
        # From here on nothing asks anything, even if the master should be lost.
        quiet = ["-o", "ControlMaster=no", "-o", "BatchMode=yes"]
        try:
            if self._has_master():
                self._words += quiet
                return
        except FileNotFoundError:
            raise UserError('ssh.backend = "openssh": ssh is not on the PATH') from None
        self._words += ["-o", f"ControlPath={self._folder}/socket"]
        # Ends with this process, however that ends: cat then finds no more input.
        stay = f"exec sh -c {shlex.quote(marked('exec cat >/dev/null'))}"
        words = [*self._words, "-T", "-o", "ControlMaster=yes", "-o", "ControlPersist=no"]
        words += ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"]
        self._master = subprocess.Popen(
            [*words, self._host, stay], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._master.stdout is not None
        for line in self._master.stdout:
            if line.strip() == MARK.encode():
                break
        else:
            self._master.wait()
            raise UserError(f"{self._host}: ssh could not sign in; its own words are above")
        self._words += quiet

    def _end(self) -> None:
        try:
            if self._master is not None:
                assert self._master.stdin is not None
                self._master.stdin.close()
                self._master.terminate()
                self._master.wait()
        finally:
            shutil.rmtree(self._folder)

    def ask(self, script: str, data: bytes = b"") -> bytes:
        """Run a bash script there; see `Transport`."""
        words = [*self._words, "-T", self._host, command(marked(script))]
        done = subprocess.run(words, input=data, capture_output=True, check=False)
        if done.returncode == LOST and self.lost:
            raise UserError(f"{self._host}: the connection was lost: {self.lost}; try again")
        return answer(self._host, done.returncode, done.stdout, done.stderr)

    def run(self, script: str) -> int:
        """Run a bash script there, with these streams; see `Transport`."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        words = [*self._words, "-t" if interactive else "-T", self._host, command(script)]
        stdin = None if interactive else subprocess.DEVNULL
        return subprocess.call(words, stdin=stdin)

    def start(self, script: str) -> Running:
        """Run a bash script there, beside others; see `Transport`."""
        return _Process([*self._words, "-T", self._host, command(script)])

    def dial(self, host: str, port: int) -> Stream:
        """Return a stream to a port there; what does not listen there is said by ssh itself."""
        ours, theirs = socket.socketpair()
        words = [*self._words, "-W", f"[{host}]:{port}", self._host]
        with theirs:
            subprocess.Popen(words, stdin=theirs.fileno(), stdout=theirs.fileno())
        return ours


class _Process:
    """A `cluster.transport.Running`."""

    def __init__(self, words: list[str]) -> None:
        pipe = subprocess.PIPE
        # Whoever reads these lines reads no others.
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
