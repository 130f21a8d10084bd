"""Questions to the user, on the terminal whatever the standard streams are."""

from __future__ import annotations

import os
import select
import termios
import threading
from typing import Any, Protocol

from cluster.login.alarm import Alarm
from runfolder.errors import UserError, printable

# A line's length in the kernel's line discipline.
LINE_BYTES = 4096


class Prompts(Protocol):
    """Who answers what a sign-in asks; tests answer by themselves."""

    def ask(self, question: str) -> str:
        """Return the answer to a question, which the terminal shows while it is typed."""
        ...

    def secret(self, question: str) -> str:
        """Return the answer to a question, which is not shown."""
        ...


class Refusal:
    """Answers nothing, where BatchMode says so."""

    def __init__(self, why: str) -> None:
        self._why = why

    def ask(self, question: str) -> str:
        """Refuse."""
        raise UserError(f"'{one_line(question)}' cannot be asked: {self._why}")

    secret = ask


class Terminal:
    """The user at /dev/tty."""

    def ask(self, question: str) -> str:
        """Return a line that is shown while it is typed.

        Raises:
            UserError: there is no terminal, or no answer (Ctrl+D).
        """
        return self._line(question, is_shown=True)

    def secret(self, question: str) -> str:
        """Return a line that is not shown.

        Raises:
            UserError: there is no terminal, or no answer (Ctrl+D).
        """
        return self._line(question, is_shown=False)

    def _line(self, question: str, *, is_shown: bool) -> str:
        try:
            # Not blocking, which holds for this descriptor alone: a signal does not have to wait.
            tty = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            raise UserError(
                f"there is no terminal to ask '{one_line(question)}' on; a key in ssh-agent, or "
                "the host's key in known_hosts, needs no question"
            ) from None
        try:
            line = _answer(tty, question, is_shown=is_shown)
        except (OSError, termios.error):
            raise UserError(f"the terminal went away at '{one_line(question)}'") from None
        finally:
            os.close(tty)
        if not line.endswith(b"\n"):
            raise UserError(f"no answer to '{one_line(question)}'")
        return line[:-1].decode(errors="surrogateescape")


def _answer(tty: int, question: str, *, is_shown: bool) -> bytes:
    """Return what was typed; a signal takes effect when the terminal is itself again.

    After Ctrl+Z and `fg` the question is asked anew.
    """
    if threading.current_thread() is not threading.main_thread():
        # Signals are for the main thread.
        line = _read(tty, question, is_shown=is_shown, until=[])
        assert line is not None
        return line
    while True:
        alarm = Alarm()
        try:
            # They raise nothing, or one more could come when the terminal is being given back.
            with alarm.watches(resize=False):
                line = _read(tty, question, is_shown=is_shown, until=[alarm.fd])
            came = alarm.take()
        finally:
            alarm.close()
        for number in came:
            os.kill(os.getpid(), number)
        if line is not None:
            return line


def _read(tty: int, question: str, *, is_shown: bool, until: list[int]) -> bytes | None:
    """Ask, and return what was typed with its newline; the terminal is given back as it was.

    None: one of the descriptors of `until` had something to read.
    """
    before = termios.tcgetattr(tty)
    asking = termios.tcgetattr(tty)
    # A line at a time, with its editing and its signals, whatever was set before.
    asking[0] |= termios.ICRNL
    asking[1] |= termios.OPOST | termios.ONLCR
    asking[3] |= termios.ICANON | termios.ISIG | termios.ECHO
    if not is_shown:
        asking[3] &= ~(termios.ECHO | termios.ECHONL)
    text = "\n".join(printable_line(line) for line in question.split("\n"))
    line = b""
    try:
        _set(tty, asking)
        if not _write(tty, text, until):
            return None
        while not line.endswith(b"\n"):
            if set(until) & set(select.select([tty, *until], [], [])[0]):
                return None
            try:
                more = os.read(tty, LINE_BYTES)
            except BlockingIOError:  # somebody else has read it
                continue
            if not more:
                break
            line += more
    finally:
        _set(tty, before)
        if not is_shown:
            # What a stopped terminal has no room for is no loss.
            _write(tty, "\n", None)
    return line


def _set(tty: int, attributes: list[Any]) -> None:
    """Set it so, and drop what was typed before: that is no answer to what comes."""
    # Not TCSAFLUSH, which waits for all to be shown, and fails if a signal comes meanwhile.
    termios.tcsetattr(tty, termios.TCSANOW, attributes)
    termios.tcflush(tty, termios.TCIFLUSH)


def _write(tty: int, text: str, until: list[int] | None) -> bool:
    """Show `text`, and return whether that is done; without `until` as far as there is room."""
    data = text.encode(errors="replace")
    while data:
        try:
            data = data[os.write(tty, data) :]
        except BlockingIOError:
            if until is None or set(until) & set(select.select(until, [tty], [])[0]):
                return False
    return True


def printable_line(text: str) -> str:
    """Return text of a stranger without what could steer the terminal; spaces stay."""
    return "".join(letter if letter.isprintable() else "?" for letter in text.expandtabs())


def one_line(question: str) -> str:
    """Return a question as a message quotes it."""
    return printable(question).rstrip(" :?")
