"""A remote shell or command, with this process's terminal or streams.

One loop waits for what is typed and for signals; threads move the streams (streams.py). All data
are bytes; nothing is decoded.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from typing import Any

from cluster.login import terminal
from cluster.login.alarm import ENDING, Alarm
from cluster.login.connection import Connection
from cluster.login.escapes import Escapes
from cluster.login.link import BROKEN
from cluster.login.streams import BLOCK_BYTES, Streams
from cluster.login.transport import LOST, to_stderr
from runfolder.errors import UserError, printable

# A connection that has ended says so a moment after its channels.
LAST_WORDS_S = 1.0
# Turns off what an interrupted remote program may have left on: mouse reports, bracketed paste,
# colors, a hidden cursor. If they are off, it does nothing.
AT_REST = b"\x1b[?1000;1002;1003;1006;2004l\x1b[?25h\x1b[m"


def run(
    connection: Connection,
    command: str | None = None,
    *,
    tty: bool | None = None,
    reads_input: bool = True,
) -> int:
    """Run a command, or the login shell, and return its exit code.

    It is 128 + n if signal n ended this process; 255 if the connection was lost, the user ended
    it, or a signal ended the command, as with ssh. What happened is reported on stderr.

    Args:
        connection: signed in; stays open.
        command: for the remote shell; None is a login shell.
        tty: whether it has a terminal; None: if there is one here for it.
        reads_input: whether it gets this process's standard input; otherwise it gets none.

    Raises:
        UserError: the server refuses the session or the terminal.
    """
    if tty is None:
        tty = reads_input and os.isatty(0) and (command is None or os.isatty(1))
    sys.stdout.flush()
    alarm = Alarm()
    try:
        session = _Session(connection, alarm, tty=tty)
        return session.run(command, reads_input=reads_input)
    finally:
        alarm.close()


class _Session:
    """One run of a command: its streams, and how it ends."""

    def __init__(self, connection: Connection, alarm: Alarm, *, tty: bool) -> None:
        self._connection = connection
        self._name = connection.host.alias
        self._alarm = alarm
        self._tty = tty
        self._escapes = Escapes(connection.host.escape_char if tty else "none")
        self._channel = connection.open_session()
        self._streams = Streams(self._channel, alarm.ring)

    def run(self, command: str | None, *, reads_input: bool) -> int:
        """Run it; see `run` above."""
        self._start(command)
        if not reads_input:
            self._streams.send_eof()
        with self._alarm.watches(resize=self._tty) as ended_by:
            try:
                with terminal.raw(0) if self._tty else contextlib.nullcontext():
                    # Not before: a terminal that is not raw yet changes the output.
                    self._streams.start()
                    # It may have changed since the request.
                    self._resize()
                    self._loop(ended_by, is_open=reads_input)
            finally:
                self._streams.stop()
                self._streams.close()
            return self._ending(ended_by)

    def _start(self, command: str | None) -> None:
        channel, host = self._channel, self._connection.host
        what = "a shell" if command is None else "a command"
        try:
            if self._tty:
                self._request_terminal()
            for name, value in host.environment(os.environ).items():
                # Bytes, as the environment and the command line are: they need not be UTF-8.
                channel.set_environment_variable(os.fsencode(name), os.fsencode(value))
            if command is None:
                channel.invoke_shell()
            else:
                channel.exec_command(os.fsencode(command))
        except BROKEN:
            why = self._connection.lost or f"the server does not let you run {what}; ask the site"
            raise UserError(f"{self._name}: {why}") from None

    def _request_terminal(self) -> None:
        try:
            self._channel.get_pty(os.fsencode(os.environ.get("TERM", "dumb")), *terminal.size(0))
        except BROKEN:
            why = self._connection.lost or (
                "the server refuses a terminal (PermitTTY in its sshd_config, or no-pty for your "
                'key); a command needs none: make ssh CMD="..." </dev/null'
            )
            raise UserError(f"{self._name}: {why}") from None

    # ---- the loop ---------------------------------------------------------------------------

    def _loop(self, ended_by: list[int], *, is_open: bool) -> None:
        streams = self._streams
        while not (streams.is_over or streams.is_broken or self._escapes.has_ended or ended_by):
            typed: list[Any] = [0] if is_open and streams.has_room else []
            ready, _, _ = select.select([self._alarm, *typed], [], [])
            for number in self._alarm.take() if self._alarm in ready else ():
                if number == signal.SIGWINCH:
                    self._resize()
                elif number in ENDING:
                    ended_by.append(number)
            if 0 in ready:
                is_open = self._read()

    def _read(self) -> bool:
        """Pass on what was typed; return whether more may come."""
        try:
            data = os.read(0, BLOCK_BYTES)
        except BlockingIOError:
            return True  # Another reader was faster, and made it non-blocking.
        except OSError:
            data = b""  # The terminal is gone.
        if not data:
            self._streams.send_eof()
            return False
        if passed := self._escapes.pass_on(data):
            self._streams.send(passed)
        return True

    def _resize(self) -> None:
        if self._tty:
            self._streams.resize(terminal.size(0))

    # ---- how it ended -----------------------------------------------------------------------

    def _ending(self, ended_by: list[int]) -> int:
        """Say how it ended, if necessary; return the exit code."""
        if self._streams.is_broken:
            raise BrokenPipeError
        if not self._streams.is_over:
            self._calm()
            if ended_by:
                return 128 + ended_by[0]
            to_stderr(f"{self._escapes.name}.\nConnection to {self._name} closed.")
            return LOST
        channel = self._channel
        if channel.exit_status == -1 or not channel.eof_received:
            self._connection.transport.join(LAST_WORDS_S)
            if lost := self._connection.lost:
                self._calm()
                to_stderr(f"{self._name}: the connection was lost: {printable(lost)}")
                return LOST
        if self._tty:
            to_stderr(f"Connection to {self._name} closed.")
        if channel.exit_status == -1:
            to_stderr(f"{self._name}: it ended without an exit code, as if killed by a signal")
            return LOST
        return int(channel.exit_status)

    def _calm(self) -> None:
        """Turn off in the terminal what the remote program no longer can."""
        # Not if the terminal is stopped: this would block, too.
        is_shown = self._tty and self._streams.has_drawn and os.isatty(1)
        if is_shown and select.select([], [1], [], 0)[1]:
            os.write(1, AT_REST)
