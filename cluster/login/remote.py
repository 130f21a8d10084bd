"""The program on the far side of a session: what it reads, what it writes, how it ends.

Paramiko's channel would do most of this, but each byte would pass through two threads, a send may
wait for ever with a dead peer, nobody is told when there is room again, and a program that a signal
ended has no exit status. So a channel's messages come here (`Transport._channel_handler_table`).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import paramiko
from paramiko import common

from cluster.login.link import BROKEN, Link
from cluster.login.outlet import Outlet
from cluster.login.terminal import Size
from runfolder.errors import UserError

# As OpenSSH: what may be under way before it has been written here. Less for a terminal, where it
# is what still comes after Ctrl+C.
WINDOW_BYTES = 2 << 20
TERMINAL_WINDOW_BYTES = 1 << 20
# Fewer and larger packets than the 32 KiB that every server takes; OpenSSH goes up to 256 KiB.
PACKET_BYTES = 128 << 10
# For what has come already to be received, when nothing can be sent any more.
LAST_WORDS_S = 1.0
# A key, or a pasted line: sent at once. A socket that select calls writable has room for it.
SMALL_BYTES = 512


class Remote:
    """A session's channel, from its start to its end."""

    def __init__(
        self, channel: paramiko.Channel, out: Outlet, err: Outlet, wake: Callable[[], None]
    ) -> None:
        """Take over `channel`; `wake` is called, by other threads, when something has changed."""
        self._channel = channel
        self._transport: Link = channel.get_transport()
        self._out, self._err = out, err
        self._wake = wake
        channel.settimeout(0.0)
        # What Paramiko keeps free for its own.
        self._packet_bytes = channel.out_max_packet_size - 64

        # What is to be sent, in the order in which it may go.
        self._work = threading.Condition()
        self._taken = 0
        self._sizes: deque[Size] = deque()
        self._data: deque[memoryview] = deque()
        self.pending_bytes = 0
        """Of its input, what is still to be sent."""
        self._is_sending = False
        self._ends = False
        self._is_closing = False

        self.exit_status: int | None = None
        self.exit_signal = ""
        """The name of the signal that ended it, without SIG."""
        self.was_closed = False
        """The server has said that all is sent. Without that, output may be missing."""

        self._handlers = self._transport._channel_handler_table
        ours: dict[int, Callable[[Any], None]] = {
            common.MSG_CHANNEL_DATA: self._receive,
            common.MSG_CHANNEL_EXTENDED_DATA: self._receive_extended,
            common.MSG_CHANNEL_WINDOW_ADJUST: self._adjust_window,
            common.MSG_CHANNEL_REQUEST: self._handle_request,
            common.MSG_CHANNEL_CLOSE: self._handle_close,
        }
        self._transport._channel_handler_table = {
            kind: self._dispatch(ours[kind], theirs) if kind in ours else theirs
            for kind, theirs in self._handlers.items()
        }
        channel.in_buffer.set_event(_Bell(wake))
        self._sender = threading.Thread(target=self._send_all, daemon=True)
        self._sender.start()

    def close(self) -> None:
        """End the session, if it has not ended by itself."""
        with self._work:
            self._is_closing = True
            self._work.notify()
        self._transport._channel_handler_table = self._handlers

    # ---- its start --------------------------------------------------------------------------

    def set_environment(self, variables: Mapping[str, str]) -> None:
        """Offer variables; the server takes those that its AcceptEnv names, and tells nobody."""
        for name, value in variables.items():
            # Bytes, as the environment and the command line are: they need not be UTF-8.
            self._channel.set_environment_variable(os.fsencode(name), os.fsencode(value))

    def request_terminal(self, term: str, size: Size, modes: bytes) -> None:
        """Have it run in a terminal of this kind.

        Raises:
            UserError: the server gives none.
        """
        # Channel.get_pty has no modes to say.
        message = self._request("pty-req", wants_reply=True)
        message.add_string(os.fsencode(term))
        _add_size(message, size)
        message.add_string(modes)
        self._channel._event_pending()
        try:
            self._transport._send_user_message(message)
            self._channel._wait_for_event()
        except BROKEN:
            raise UserError(
                "the server gives no terminal (PermitTTY in its sshd_config, or no-pty with your "
                'key); a command needs none: make ssh CMD="..." </dev/null'
            ) from None

    def start(self, command: str | None) -> None:
        """Start a command, or the login shell.

        Raises:
            UserError: the server refuses.
        """
        try:
            if command is None:
                self._channel.invoke_shell()
            else:
                self._channel.exec_command(os.fsencode(command))
        except BROKEN:
            what = "a shell" if command is None else "a command"
            raise UserError(f"the server does not run {what} for you; ask the site") from None

    # ---- its input --------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Have `data` sent: at once if it is small and nothing is in the way."""
        with self._work:
            goes_now = (
                len(data) <= SMALL_BYTES
                and not self._data
                and not self._is_sending
                and self._channel.send_ready()
                and self._transport.clear_to_send.is_set()
                and _has_room(self._transport.sock)
            )
            if not goes_now:
                self._keep(data)
        if goes_now and (rest := data[self._send_now(data) :]):
            with self._work:
                self._keep(rest)

    def _keep(self, data: bytes) -> None:
        self._data.append(memoryview(data))
        self.pending_bytes += len(data)
        self._work.notify()

    def send_eof(self) -> None:
        """Have its input end after what is still to be sent."""
        with self._work:
            self._ends = True
            self._work.notify()

    def resize(self, size: Size) -> None:
        """Have its terminal resized."""
        with self._work:
            self._sizes.append(size)
            self._work.notify()

    def _send_now(self, data: bytes) -> int:
        try:
            return self._send(data)
        except (paramiko.SSHException, EOFError):
            # The link has broken. The sender finds the same, and ends it.
            return 0

    def _send(self, data: bytes) -> int:
        """Send as much as there is room for; return how many bytes."""
        try:
            return int(self._channel.send(data))
        except TimeoutError:
            return 0
        except OSError:
            return len(data)  # It has ended and reads no more.

    def _send_all(self) -> None:
        """Send what comes up until the session is closed; the only one that may have to wait."""
        try:
            while job := self._next():
                job()
                with self._work:
                    self._is_sending = False
        except BROKEN as error:
            self._lose(error)
        with contextlib.suppress(*BROKEN):
            self._channel.close()
        self._wake()

    def _lose(self, error: Exception) -> None:
        """End the link, on which nothing can be sent: else the session would live on, deaf."""
        if isinstance(error, (EOFError, OSError)):
            # The thread that receives finds out, too, and may still have something to receive.
            self._transport.join(LAST_WORDS_S)
        elif self._transport.saved_exception is None:
            self._transport.given_up = error
        self._transport.close()

    def _next(self) -> Callable[[], None] | None:
        """Return what can be sent next; None at the end."""
        with self._work:
            while not self._is_closing:
                # First of all: a program that waits for room may not read what it is sent.
                if self._taken:
                    taken, self._taken = self._taken, 0
                    return lambda: self._send_room(taken)
                if self._sizes:
                    size = self._sizes.popleft()
                    return lambda: self._send_size(size)
                if self._data and self._channel.send_ready():
                    self._is_sending = True
                    return self._send_first
                if self._ends and not self._data:
                    self._ends = False
                    return self._send_eof
                self._work.wait()
        return None

    def _send_first(self) -> None:
        """Send a packet of what waits."""
        with self._work:
            data = self._data.popleft()
            # What is left of one piece goes with the next, not as a small packet of its own.
            while len(data) < self._packet_bytes and self._data:
                data = memoryview(b"".join((data, self._data.popleft())))
        sent = self._send(bytes(data[: self._packet_bytes]))
        with self._work:
            self.pending_bytes -= sent
            if sent < len(data):
                self._data.appendleft(data[sent:])
        if sent == len(data):
            self._wake()

    def _send_eof(self) -> None:
        self._channel.shutdown_write()

    def _send_room(self, taken: int) -> None:
        message = paramiko.Message()
        message.add_byte(common.cMSG_CHANNEL_WINDOW_ADJUST)
        message.add_int(self._channel.remote_chanid)
        message.add_int(taken)
        self._transport._send_user_message(message)

    def _send_size(self, size: Size) -> None:
        # Channel.resize_pty raises once the program has closed its output, which may be long
        # before it ends.
        message = self._request("window-change", wants_reply=False)
        _add_size(message, size)
        if not self.is_over:
            self._transport._send_user_message(message)

    def _request(self, kind: str, *, wants_reply: bool) -> paramiko.Message:
        message = paramiko.Message()
        message.add_byte(common.cMSG_CHANNEL_REQUEST)
        message.add_int(self._channel.remote_chanid)
        message.add_string(kind)
        message.add_boolean(wants_reply)
        return message

    # ---- its output and its end -------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come from it."""
        return bool(self._channel.closed)

    def flush(self) -> None:
        """Write what was kept, as far as there is room."""
        self._take(sum(outlet.flush() for outlet in {self._out, self._err}))

    def _take(self, written: int) -> None:
        """Tell the server of room, for what was written."""
        if written and (taken := self._channel._check_add_window(written)):
            with self._work:
                self._taken += taken
                self._work.notify()

    def _dispatch(
        self, ours: Callable[[Any], None], theirs: Callable[[paramiko.Channel, Any], None]
    ) -> Callable[[paramiko.Channel, Any], None]:
        def handle(channel: paramiko.Channel, message: Any) -> None:
            if channel is self._channel:
                ours(message)
            else:
                theirs(channel, message)

        return handle

    def _receive(self, message: Any) -> None:
        self._put(self._out, message.get_binary())

    def _receive_extended(self, message: Any) -> None:
        kind, data = message.get_int(), message.get_binary()
        if kind == 1:  # the only one that there is: stderr
            self._put(self._err, data)

    def _put(self, outlet: Outlet, data: bytes) -> None:
        written = outlet.put(data)
        self._take(written)
        if written < len(data) or outlet.broken is not None:
            self._wake()

    def _adjust_window(self, message: Any) -> None:
        self._channel._window_adjust(message)
        with self._work:
            self._work.notify()

    def _handle_request(self, message: Any) -> None:
        kind = message.get_text()
        if kind == "exit-signal":
            message.get_boolean()
            self.exit_signal = message.get_text()
            return
        message.rewind()
        message.get_int()
        self._channel._handle_request(message)
        if kind == "exit-status":
            self.exit_status = self._channel.exit_status

    def _handle_close(self, message: Any) -> None:
        self.was_closed = True
        self._channel._handle_close(message)


class _Bell:
    """What a Paramiko buffer rings when it is closed, as an event."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.set = wake

    def clear(self) -> None:
        pass


def _add_size(message: paramiko.Message, size: Size) -> None:
    for number in (size.columns, size.rows, size.width, size.height):
        message.add_int(number)


def _has_room(sock: Any) -> bool:
    """Whether a small packet can be sent without waiting; False where that is not known."""
    try:
        return isinstance(sock, socket.socket) and bool(select.select([], [sock], [], 0)[1])
    except (ValueError, OSError):  # closed, by the thread that receives
        return False
