"""A shell or a command on the far side, with this process's terminal or streams.

One loop waits for what is typed, for room where output goes, and for signals; what comes from the
server is written by the thread that receives it (remote.py). Bytes all the way, nothing is decoded.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import time

from cluster.login import remote, tty_modes
from cluster.login.alarm import ENDING, Alarm
from cluster.login.connection import Connection
from cluster.login.escapes import HELP, Action, Escapes
from cluster.login.link import BROKEN
from cluster.login.outlet import Outlet
from cluster.login.remote import Remote
from cluster.login.terminal import Size, Terminal
from runfolder.errors import UserError, printable

READ_BYTES = 1 << 18
# As much as a terminal gives at once; memory for more would be mapped and unmapped for each key.
TERMINAL_READ_BYTES = 1 << 12
# What may wait to be sent before no more is read. More with a terminal, where ~. is to be seen
# although the server takes nothing.
PENDING_BYTES = 1 << 18
TERMINAL_PENDING_BYTES = 1 << 20
REDRAW_S = 0.1
# For a terminal that stands still, to take what turns its modes off.
RESET_S = 1.0
# As the ssh command: the connection, not the command, is what failed.
LOST = 255


def run(
    connection: Connection,
    command: str | None = None,
    *,
    tty: bool | None = None,
    forward_agent: bool = False,
    reads_input: bool = True,
) -> int:
    """Run a command, or the login shell, and return its exit code.

    Args:
        connection: signed in; stays open.
        command: for the shell of the far side; None is a login shell.
        tty: whether it has a terminal; None: if there is one here for it.
        forward_agent: whether it may use the agent of this machine.
        reads_input: whether it gets this process's standard input; otherwise it gets none.

    Returns:
        Its exit code; 128 + n if signal n ended it, or this process; 255 if the connection was
        lost or the user ended it, as with ssh. What happened is said on stderr.

    Raises:
        UserError: the server refuses the session, the terminal or the agent.
    """
    if tty is None:
        tty = reads_input and os.isatty(0) and (command is None or os.isatty(1))
    if tty and not os.isatty(0):
        raise UserError("standard input is no terminal; leave it as it is, or run without one")
    sys.stdout.flush()
    session = Session(connection, reads_input=reads_input)
    try:
        return session.run(command, tty=tty, forward_agent=forward_agent)
    finally:
        session.close()


class Session:
    """One run of a command: its streams, and the end that it comes to."""

    def __init__(self, connection: Connection, *, reads_input: bool) -> None:
        self._connection = connection
        self._name = connection.host.alias
        self._reads_input = reads_input
        self._alarm = Alarm()
        self._terminal: Terminal | None = None
        self._remote: Remote | None = None
        self._escapes = Escapes("none")
        self._resizes_at: float | None = None
        self._out = Outlet(1, self._see if os.isatty(1) else None)
        self._err = Outlet(2, self._see if os.isatty(2) else None)
        self._is_ended = False
        """By the user, with ~."""

    def close(self) -> None:
        """Give back all but the connection."""
        if self._remote is not None:
            self._remote.close()
        self._out.close()
        self._err.close()
        self._alarm.close()

    def run(self, command: str | None, *, tty: bool, forward_agent: bool) -> int:
        """Run it; see `run` above."""
        terminal = self._terminal = Terminal(0) if tty else None
        if terminal is not None:
            # A terminal that is not raw yet would show the first lines in its own way.
            self._out.hold()
            self._err.hold()
        self._start(command, terminal, forward_agent=forward_agent)
        assert self._remote is not None
        if not self._reads_input:
            self._remote.send_eof()
        with self._alarm.watches(resize=tty) as ended_by:
            if terminal is None:
                self._loop(ended_by)
            else:
                with terminal:
                    self._out.release()
                    self._err.release()
                    # It may have changed since the request.
                    self._resize()
                    try:
                        self._loop(ended_by)
                    finally:
                        self._reset(terminal)
        return self._ending(ended_by, tty=tty)

    def _start(
        self, command: str | None, terminal: Terminal | None, *, forward_agent: bool
    ) -> None:
        transport, host = self._connection.transport, self._connection.host
        transport.default_max_packet_size = remote.PACKET_BYTES
        transport.default_window_size = (
            remote.WINDOW_BYTES if terminal is None else remote.TERMINAL_WINDOW_BYTES
        )
        channel = self._connection.open_session()
        started = self._remote = Remote(channel, self._out, self._err, self._alarm.ring)
        try:
            if forward_agent:
                self._connection.forward_agent(channel)
            if terminal is not None:
                started.request_terminal(
                    os.environ.get("TERM", "dumb"),
                    terminal.size(),
                    tty_modes.encode(terminal.attributes),
                )
                self._escapes = Escapes(host.escape_char)
            started.set_environment(host.environment(os.environ))
            started.start(command)
        except UserError as error:
            why = self._connection.lost or str(error)
            raise UserError(f"{self._name}: {why}") from None
        except BROKEN as error:
            why = self._connection.lost or printable(str(error)) or "the connection ended"
            raise UserError(f"{self._name}: no session: {why}; try again") from None

    def _see(self, data: bytes) -> None:
        if (terminal := self._terminal) is not None:
            terminal.note(data)

    # ---- the loop ---------------------------------------------------------------------------

    def _loop(self, ended_by: list[int]) -> None:
        assert self._remote is not None
        is_open = self._reads_input
        limit = PENDING_BYTES if self._terminal is None else TERMINAL_PENDING_BYTES
        while not self._is_ended and not ended_by:
            # Before the look at the outlets, as the last that comes may have to wait there.
            is_over = self._remote.is_over
            outlets = {outlet for outlet in (self._out, self._err) if outlet.is_waiting}
            if self._out.broken or (is_over and not outlets):
                return
            reading = [self._alarm.fd]
            if is_open and self._remote.pending_bytes < limit:
                reading.append(0)
            ready, _, _ = select.select(reading, [out.fd for out in outlets], [], self._due_in())
            if self._resizes_at is not None and self._due_in() == 0:
                self._resize()
            for number in self._alarm.take() if self._alarm.fd in ready else ():
                self._obey(number, ended_by)
            # What is kept from now on rings, and is seen in the next turn.
            if outlets:
                self._remote.flush()
            if 0 in ready:
                is_open = self._read()

    def _read(self) -> bool:
        """Pass on what was typed; return whether more may come."""
        assert self._remote is not None
        try:
            data = os.read(0, READ_BYTES if self._terminal is None else TERMINAL_READ_BYTES)
        except BlockingIOError:
            return True  # Who else has this input was quicker, and has set it so.
        except OSError:
            data = b""  # The terminal is gone.
        if not data:
            self._remote.send_eof()
            return False
        for piece in self._escapes.split(data):
            if isinstance(piece, bytes):
                self._remote.send(piece)
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
            self._say(f"{name}?\n{HELP.format(name)}".rstrip())
        else:
            self._say(f"{name}^Z [suspend]")
            self._suspend()

    def _suspend(self) -> None:
        assert self._remote is not None
        if self._terminal is None:
            return
        self._terminal.suspend()
        # The shell has written over what the remote program drew, and only a change of the size
        # has it draw that again: one that it takes note of before the next.
        size = self._terminal.size()
        self._remote.resize(Size(size.columns, max(1, size.rows - 1)))
        self._resizes_at = time.monotonic() + REDRAW_S

    def _due_in(self) -> float | None:
        """Return in how many seconds the terminal's size is to be told; None: with its change."""
        if self._resizes_at is None:
            return None
        return max(0.0, self._resizes_at - time.monotonic())

    def _resize(self) -> None:
        assert self._remote is not None
        self._resizes_at = None
        if self._terminal is not None:
            self._remote.resize(self._terminal.size())

    def _obey(self, number: int, ended_by: list[int]) -> None:
        assert self._remote is not None
        if number == signal.SIGWINCH:
            self._resize()
        elif number == signal.SIGTSTP:
            self._suspend()
        elif number in ENDING:
            ended_by.append(number)

    # ---- what is said -----------------------------------------------------------------------

    def _say(self, text: str) -> None:
        """Say something on stderr; in a raw terminal a new line does not begin at the left."""
        end = "\r\n" if self._terminal is not None and self._terminal.is_raw else "\n"
        print(text.replace("\n", end), end=end, file=sys.stderr, flush=True)

    def _reset(self, terminal: Terminal) -> None:
        """Turn off what the remote program can no longer turn off itself."""
        assert self._remote is not None
        is_waiting = self._out.is_waiting or self._err.is_waiting
        if self._remote.was_closed and not is_waiting:
            return
        # Not after what waits: a slow terminal would show that for long.
        self._out.stop()
        self._err.stop()
        shown = self._out if os.isatty(1) else self._err
        terminal.reset_modes(lambda undo: shown.finish(undo, RESET_S))

    def _ending(self, ended_by: list[int], *, tty: bool) -> int:
        """Say how it ended where that needs saying; return the exit code."""
        assert self._remote is not None
        if ended_by:
            return 128 + ended_by[0]
        if self._out.broken:
            raise BrokenPipeError
        if self._is_ended:
            # Not at once: the terminal may stand still.
            self._say(f"{self._escapes.name}.")
            self._say(f"Connection to {self._name} closed.")
            return LOST
        if not self._remote.was_closed:
            self._say(f"{self._name}: the connection was lost: {self._why_lost()}")
            return LOST
        if tty:
            self._say(f"Connection to {self._name} closed.")
        if self._remote.exit_signal:
            name = re.sub(r"\W", "?", self._remote.exit_signal)
            self._say(f"{self._name}: it was ended by signal {name}")
            return 128 + getattr(signal, f"SIG{name}", 127)
        if self._remote.exit_status is None:
            self._say(f"{self._name}: it ended, and the server does not say how")
            return LOST
        return self._remote.exit_status

    def _why_lost(self) -> str:
        # The thread that receives ends a moment after the channel.
        with contextlib.suppress(RuntimeError):
            self._connection.transport.join(timeout=1)
        return self._connection.lost or "the server ended it"
