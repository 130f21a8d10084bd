"""A shell or a command on the far side, with this process's terminal or streams.

One loop waits for what is typed and for signals; threads move the streams (streams.py). Bytes all
the way, nothing is decoded.
"""

from __future__ import annotations

import os
import select
import signal
import sys

import paramiko

from cluster.login import tty_modes
from cluster.login.alarm import ENDING, Alarm
from cluster.login.connection import Connection
from cluster.login.escapes import HELP, Action, Escapes
from cluster.login.link import BROKEN
from cluster.login.streams import BLOCK_BYTES, Streams
from cluster.login.terminal import Terminal
from cluster.login.transport import LOST
from runfolder.errors import UserError, printable

# A connection that has ended says so a moment after its channels.
LAST_WORDS_S = 1.0
# What a remote program that could not end may have left on: a mouse that types, bracketed paste,
# colors, a cursor that is not seen. Where they are off, it does nothing.
AT_REST = b"\x1b[?1000;1002;1003;1006;2004l\x1b[?25h\x1b[m"


def run(
    connection: Connection,
    command: str | None = None,
    *,
    tty: bool | None = None,
    reads_input: bool = True,
) -> int:
    """Run a command, or the login shell, and return its exit code.

    Args:
        connection: signed in; stays open.
        command: for the shell of the far side; None is a login shell.
        tty: whether it has a terminal; None: if there is one here for it.
        reads_input: whether it gets this process's standard input; otherwise it gets none.

    Returns:
        Its exit code; 128 + n if signal n ended this process; 255 if the connection was lost, the
        user ended it, or a signal ended the command, as with ssh. What happened is said on stderr.

    Raises:
        UserError: the server refuses the session or the terminal.
    """
    if tty is None:
        tty = reads_input and os.isatty(0) and (command is None or os.isatty(1))
    if tty and not os.isatty(0):
        raise UserError("standard input is no terminal; leave it as it is, or run without one")
    sys.stdout.flush()
    alarm = Alarm()
    try:
        session = _Session(connection, alarm, Terminal(0) if tty else None)
        return session.run(command, reads_input=reads_input)
    finally:
        alarm.close()


class _Session:
    """One run of a command: its streams, and the end that it comes to."""

    def __init__(self, connection: Connection, alarm: Alarm, terminal: Terminal | None) -> None:
        self._connection = connection
        self._name = connection.host.alias
        self._alarm = alarm
        self._terminal = terminal
        self._escapes = Escapes(connection.host.escape_char if terminal else "none")
        self._channel = connection.open_session()
        self._streams = Streams(self._channel, alarm.ring, is_terminal=terminal is not None)
        self._is_ended = False
        """By the user, with ~."""

    def run(self, command: str | None, *, reads_input: bool) -> int:
        """Run it; see `run` above."""
        self._start(command)
        if not reads_input:
            self._streams.send_eof()
        terminal = self._terminal
        with self._alarm.watches(resize=terminal is not None) as ended_by:
            try:
                if terminal is None:
                    self._streams.start()
                    self._loop(ended_by, is_open=reads_input)
                else:
                    with terminal:
                        # Not before: one that is not raw yet shows lines in its own way.
                        self._streams.start()
                        # It may have changed since the request.
                        self._streams.resize(terminal.size())
                        self._loop(ended_by, is_open=reads_input)
            finally:
                self._streams.stop()
                self._streams.close()
            return self._ending(ended_by)

    def _start(self, command: str | None) -> None:
        channel, host = self._channel, self._connection.host
        what = "a shell" if command is None else "a command"
        try:
            if self._terminal is not None:
                self._request_terminal(self._terminal)
            for name, value in host.environment(os.environ).items():
                # Bytes, as the environment and the command line are: they need not be UTF-8.
                channel.set_environment_variable(os.fsencode(name), os.fsencode(value))
            if command is None:
                channel.invoke_shell()
            else:
                channel.exec_command(os.fsencode(command))
        except BROKEN:
            why = self._connection.lost or f"the server does not run {what} for you; ask the site"
            raise UserError(f"{self._name}: {why}") from None

    def _request_terminal(self, terminal: Terminal) -> None:
        # Channel.get_pty has no modes to say.
        message = paramiko.Message()
        message.add_byte(paramiko.common.cMSG_CHANNEL_REQUEST)
        message.add_int(self._channel.remote_chanid)
        message.add_string("pty-req")
        message.add_boolean(True)
        message.add_string(os.fsencode(os.environ.get("TERM", "dumb")))
        # In characters; in pixels it is not known.
        for number in (*terminal.size(), 0, 0):
            message.add_int(number)
        message.add_string(tty_modes.encode(terminal.attributes))
        self._channel._event_pending()
        try:
            self._connection.transport._send_user_message(message)
            self._channel._wait_for_event()
        except BROKEN:
            why = self._connection.lost or (
                "the server gives no terminal (PermitTTY in its sshd_config, or no-pty with your "
                'key); a command needs none: make ssh CMD="..." </dev/null'
            )
            raise UserError(f"{self._name}: {why}") from None

    # ---- the loop ---------------------------------------------------------------------------

    def _loop(self, ended_by: list[int], *, is_open: bool) -> None:
        streams = self._streams
        while not (streams.is_over or streams.is_broken or self._is_ended or ended_by):
            reading = [self._alarm.fd]
            if is_open and streams.has_room:
                reading.append(0)
            ready, _, _ = select.select(reading, [], [])
            for number in self._alarm.take() if self._alarm.fd in ready else ():
                self._obey(number, ended_by)
            if 0 in ready:
                is_open = self._read()

    def _read(self) -> bool:
        """Pass on what was typed; return whether more may come."""
        try:
            data = os.read(0, BLOCK_BYTES)
        except BlockingIOError:
            return True  # Who else has this input was quicker, and has set it so.
        except OSError:
            data = b""  # The terminal is gone.
        if not data:
            self._streams.send_eof()
            return False
        for piece in self._escapes.split(data):
            if isinstance(piece, bytes):
                self._streams.send(piece)
            else:
                self._act(piece)
                if self._is_ended:
                    break
        return True

    def _act(self, action: Action) -> None:
        name = self._escapes.name
        if action is Action.END:
            self._is_ended = True
        elif action is Action.HELP:
            self._say(f"{name}?\n{HELP.format(name)}")
        else:
            self._say(f"{name}^Z [suspend]")
            self._suspend()

    def _suspend(self) -> None:
        if self._terminal is not None:
            self._terminal.suspend()
            self._streams.resize(self._terminal.size())

    def _obey(self, number: int, ended_by: list[int]) -> None:
        if number == signal.SIGWINCH and self._terminal is not None:
            self._streams.resize(self._terminal.size())
        elif number == signal.SIGTSTP:
            self._suspend()
        elif number in ENDING:
            ended_by.append(number)

    # ---- how it ended -----------------------------------------------------------------------

    def _say(self, text: str) -> None:
        """Say something on stderr; in a raw terminal a new line does not begin at the left."""
        end = "\r\n" if self._terminal is not None and self._terminal.is_raw else "\n"
        print(text.replace("\n", end), end=end, file=sys.stderr, flush=True)

    def _ending(self, ended_by: list[int]) -> int:
        """Say how it ended where that needs saying; return the exit code."""
        if self._streams.is_broken:
            raise BrokenPipeError
        if not self._streams.is_over:
            self._calm()
            if ended_by:
                return 128 + ended_by[0]
            self._say(f"{self._escapes.name}.\nConnection to {self._name} closed.")
            return LOST
        channel = self._channel
        if channel.exit_status == -1 or not channel.eof_received:
            self._connection.transport.join(LAST_WORDS_S)
            if lost := self._connection.lost:
                self._calm()
                self._say(f"{self._name}: the connection was lost: {printable(lost)}")
                return LOST
        if self._terminal is not None:
            self._say(f"Connection to {self._name} closed.")
        if channel.exit_status == -1:
            self._say(f"{self._name}: it ended without an exit code, as by a signal")
            return LOST
        return int(channel.exit_status)

    def _calm(self) -> None:
        """Turn off in the terminal what the remote program no longer can."""
        # Never where it stands still: this would wait with it.
        is_shown = self._terminal is not None and self._streams.has_drawn and os.isatty(1)
        if is_shown and select.select([], [1], [], 0)[1]:
            os.write(1, AT_REST)
