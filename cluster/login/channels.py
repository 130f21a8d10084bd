"""The way to a login node in Python: each command is a channel of one connection."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Sequence
from types import TracebackType

import paramiko

from cluster.login import config, connection, session, shell
from cluster.login.link import BROKEN
from cluster.login.transport import Running, Stream
from cluster.site import Ssh
from runfolder.errors import UserError

BLOCK_BYTES = 1 << 16


class Channels:
    """A `cluster.login.transport.Transport`."""

    def __init__(self, settings: Ssh) -> None:
        self._host = settings.host
        host = config.resolve(
            settings.host, user=settings.user, port=settings.port, config=settings.config
        )
        # From here on signed in.
        self._connection = connection.connect(host)

    def __enter__(self) -> Channels:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()

    @property
    def lost(self) -> str:
        """Why there is no connection any more; see `Transport`."""
        if self._connection.transport.is_active():
            return ""
        return self._connection.lost or "it was closed"

    def ask(self, script: str, data: bytes = b"") -> bytes:
        """Run a bash script there; see `Transport`."""
        answer = shell.Answer.of(script)
        channel = self._connection.open_session()
        try:
            channel.exec_command(shell.command(answer.script))
            # All three at once: each may have to wait for another.
            threads = [
                threading.Thread(target=_send, args=(channel, data), daemon=True),
                threading.Thread(target=_collect_errors, args=(channel, answer), daemon=True),
            ]
            for thread in threads:
                thread.start()
            while output := channel.recv(BLOCK_BYTES):
                if answer.take(output):
                    # What a login file has left running may hold the channel open.
                    if answer.code:
                        threads[1].join(shell.LAST_WORDS_S)
                    return answer.words(self._host, 0)
            for thread in threads:
                thread.join()
            code = channel.recv_exit_status()
        except BROKEN as error:
            raise self._lost(str(error)) from None
        finally:
            _close(channel)
        if code < 0 and self.lost:
            raise self._lost("it was closed")
        # Without one, a signal has ended it there.
        return answer.words(self._host, code)

    def run(self, script: str, modules: Sequence[str] = ()) -> int:
        """Run a bash script there, with these streams; see `Transport`."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        words = shell.command(script, modules)
        # A command reads nothing; it shall not take what a loop around it reads line by line.
        return session.run(self._connection, words, tty=interactive, reads_input=interactive)

    def start(self, script: str, modules: Sequence[str] = ()) -> Running:
        """Run a bash script there, beside others; see `Transport`."""
        channel = self._connection.open_session()
        try:
            channel.exec_command(shell.command(script, modules))
        except BROKEN as error:
            raise self._lost(str(error)) from None
        return _Channel(channel)

    def dial(self, host: str, port: int) -> Stream:
        """Return a stream to a port there; see `Transport`."""
        try:
            stream: Stream = self._connection.transport.open_channel(
                "direct-tcpip", (host, port), ("127.0.0.1", 0)
            )
            return stream
        except paramiko.ChannelException as error:
            # The codes of RFC 4254, section 5.1.
            if error.code == 1:
                why = "sshd there forwards no ports (AllowTcpForwarding); ask the site"
            else:
                why = f"nothing takes connections at port {port} of {host}, as {self._host} sees it"
            raise UserError(f"{host}:{port}: {why}") from None
        except BROKEN as error:
            raise self._lost(str(error)) from None

    def _lost(self, why: str) -> UserError:
        return UserError(
            f"{self._host}: the connection was lost: {self._connection.lost or why}; make status "
            "shows what became of a job"
        )


class _Channel:
    """A `cluster.login.transport.Running`."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        # Whoever reads these lines reads no others; both would wait for each other's room.
        channel.set_combine_stderr(True)
        self._lines = channel.makefile("rb")

    def read_line(self) -> str:
        line: bytes = self._lines.readline()
        return line.decode(errors="replace")

    def is_over(self) -> bool:
        return bool(self._channel.exit_status_ready() or self._channel.closed)

    def end(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._channel.shutdown_write()
        self._channel.status_event.wait(timeout=30)
        _close(self._channel)


def _close(channel: paramiko.Channel) -> None:
    # With a connection that is gone there is nobody to tell.
    with contextlib.suppress(EOFError, OSError):
        channel.close()


def _send(channel: paramiko.Channel, data: bytes) -> None:
    try:
        channel.sendall(data)
        channel.shutdown_write()
    except (EOFError, OSError):
        # Whoever reads the answer finds out why.
        return


def _collect_errors(channel: paramiko.Channel, answer: shell.Answer) -> None:
    while errors := channel.recv_stderr(BLOCK_BYTES):
        for line in answer.take_error(errors):
            connection.to_stderr(line)
