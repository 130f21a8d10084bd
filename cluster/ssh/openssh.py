"""The way to a login node by the `ssh` command, for what Paramiko lacks: Kerberos, security keys.

One process signs in and stays (ControlMaster); all else goes through it. A master that the user has
already is used as it is.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from cluster.errors import UserError
from cluster.site import Ssh
from cluster.transport import Running, Stream, answer, command, marked


class OpenSsh:
    """A `cluster.transport.Transport`."""

    def __init__(self, settings: Ssh) -> None:
        self._host = settings.host
        self._words = ["ssh"]
        if settings.config:
            self._words += ["-F", settings.config]
        if settings.user:
            self._words += ["-l", settings.user]
        if settings.port:
            self._words += ["-p", str(settings.port)]
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
        ended = self._master is not None and self._master.poll() is not None
        return "ssh has ended" if ended else ""

    def _sign_in(self) -> None:
        check = [*self._words, "-O", "check", self._host]
        try:
            if subprocess.run(check, capture_output=True, check=False).returncode == 0:
                return
        except FileNotFoundError:
            raise UserError('ssh.backend = "openssh": ssh is not on the PATH') from None
        self._words += ["-o", f"ControlPath={self._folder}/socket"]
        # Ends with this process, however that ends: cat then finds no more input.
        stay = "exec sh -c 'echo; echo -- sluice --; exec cat >/dev/null'"
        words = [*self._words, "-T", "-o", "ControlMaster=yes", "-o", "ControlPersist=no"]
        self._master = subprocess.Popen(
            [*words, self._host, stay], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._master.stdout is not None
        for line in self._master.stdout:
            if line.strip() == b"-- sluice --":
                break
        else:
            self._master.wait()
            raise UserError(f"{self._host}: ssh could not sign in; its own words are above")
        # From here on nothing asks anything, even if the master should be lost.
        self._words += ["-o", "ControlMaster=no", "-o", "BatchMode=yes"]

    def _end(self) -> None:
        if self._master is not None:
            assert self._master.stdin is not None
            self._master.stdin.close()
            self._master.terminate()
            self._master.wait()
        shutil.rmtree(self._folder)

    def ask(self, script: str, data: bytes = b"") -> bytes:
        """Run a bash script there; see `Transport`."""
        words = [*self._words, "-T", self._host, command(marked(script))]
        done = subprocess.run(words, input=data, capture_output=True, check=False)
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
        """Return a stream to a port there; see `Transport`."""
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
        self._process.wait()
