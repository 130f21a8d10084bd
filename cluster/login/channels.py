"""Commands on a login node in Python, if there is no ssh: each command is a channel."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Self

import paramiko

from cluster import clean_shell
from cluster.login import config, connection, session
from cluster.login.link import BROKEN
from cluster.login.transport import Running, Stream
from cluster.site.settings import Ssh
from runfolder.errors import UserError

# How long a script there may take to end once its input has.
END_S = 30


class Channels:
    """A `cluster.login.transport.Transport`."""

    def __init__(self, settings: Ssh) -> None:
        self._host = settings.host
        host = config.resolve(
            settings.host, user=settings.user, port=settings.port, config=settings.config
        )
        self._connection = connection.connect(host)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @property
    def lost(self) -> str:
        """Why the connection is gone; see `Transport`."""
        return self._connection.lost

    def ask(self, script: str, data: bytes = b"") -> bytes:
        """Run a bash script there; see `Transport`."""
        answer = clean_shell.Answer.of(script)
        channel = self._start(clean_shell.command(answer.script))

        def send() -> None:
            with contextlib.suppress(*BROKEN):
                channel.sendall(data)
                channel.shutdown_write()

        answer.collect(send, channel.recv, channel.recv_stderr)
        code = 0 if answer.code is not None else channel.recv_exit_status()
        _close(channel)
        if code < 0 and self.lost:
            raise self._ended("it was closed")
        return answer.words(self._host, code)

    def run(self, script: str, modules: Sequence[str] = ()) -> int:
        """Run a bash script there, with these streams; see `Transport`."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        words = clean_shell.command(script, modules)
        # A command reads nothing; it must not consume what a loop around it reads line by line.
        return session.run(self._connection, words, tty=interactive, reads_input=interactive)

    def start(self, script: str, modules: Sequence[str] = ()) -> Running:
        """Run a bash script there, beside others; see `Transport`."""
        return _Channel(self._start(clean_shell.command(script, modules)))

    def dial(self, host: str, port: int) -> Stream:
        """Return a stream to a port there; see `Transport`."""
        link = self._connection.transport
        try:
            stream: Stream = link.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0))
            return stream
        except paramiko.ChannelException as error:
            # The codes of RFC 4254, section 5.1.
            if error.code == 1:
                why = "sshd there does not forward ports (AllowTcpForwarding); ask the site"
            else:
                why = f"nothing accepts connections on port {port} of {host} from {self._host}"
            raise UserError(f"{host}:{port}: {why}") from None
        except BROKEN as error:
            raise self._ended(str(error)) from None

    def _start(self, command: str) -> paramiko.Channel:
        channel = self._connection.open_session()
        try:
            channel.exec_command(command)
        except BROKEN as error:
            raise self._ended(str(error)) from None
        return channel

    def _ended(self, why: str) -> UserError:
        return UserError(
            f"{self._host}: the connection was lost: {self.lost or why}; make status shows what "
            "happened to a job"
        )


class _Channel:
    """A `cluster.login.transport.Running`."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        # Only these lines are read here; with two streams, each could block the other.
        channel.set_combine_stderr(True)
        self._lines = channel.makefile("rb")

    def read_line(self) -> str:
        line: bytes = self._lines.readline()
        return line.decode(errors="replace")

    def is_over(self) -> bool:
        return bool(self._channel.exit_status_ready() or self._channel.closed)

    def end(self) -> None:
        with contextlib.suppress(*BROKEN):
            self._channel.shutdown_write()
        self._channel.status_event.wait(END_S)
        _close(self._channel)


def _close(channel: paramiko.Channel) -> None:
    # If the connection is gone, there is nobody to tell.
    with contextlib.suppress(*BROKEN):
        channel.close()
