"""Questions to the user, on the terminal whatever the standard streams are."""

from __future__ import annotations

import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol, TypeVar

from cluster.errors import UserError, printable

# What ends or stops a process from outside; Ctrl+C is Python's own.
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)
# A line's length in the kernel's line discipline.
LINE_BYTES = 4096
Answer = TypeVar("Answer")


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
            tty = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            raise UserError(
                f"there is no terminal to ask '{one_line(question)}' on; a key in ssh-agent, or "
                "the host's key in known_hosts, needs no question"
            ) from None
        try:
            line = _until_answered(lambda: _read(tty, question, is_shown=is_shown))
        finally:
            os.close(tty)
        if not line.endswith(b"\n"):
            raise UserError(f"no answer to '{one_line(question)}'")
        return line[:-1].decode(errors="surrogateescape")


class _Signalled(Exception):
    """A signal came while a question was open."""

    def __init__(self, number: int) -> None:
        self.number = number


def _until_answered(ask: Callable[[], Answer]) -> Answer:
    """Return the answer; a signal takes effect when the terminal is itself again.

    After Ctrl+Z and `fg` the question is asked anew.
    """
    while True:
        try:
            with _signals_raise():
                return ask()
        except _Signalled as signalled:
            os.kill(os.getpid(), signalled.number)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let signals that would end or stop the process raise an exception instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise _Signalled(number)

    before: dict[int, Any] = {}
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, interrupt)
        yield
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)


def _read(tty: int, question: str, *, is_shown: bool) -> bytes:
    """Ask, and return what was typed with its newline; the terminal is given back as it was."""
    before = termios.tcgetattr(tty)
    asking = termios.tcgetattr(tty)
    # A line at a time, with its editing and its signals, whatever was set before.
    asking[0] |= termios.ICRNL
    asking[1] |= termios.OPOST | termios.ONLCR
    asking[3] |= termios.ICANON | termios.ISIG | termios.ECHO
    if not is_shown:
        asking[3] &= ~(termios.ECHO | termios.ECHONL)
    try:
        # What was typed before the question came is no answer to it.
        termios.tcsetattr(tty, termios.TCSAFLUSH, asking)
        _write(tty, "\n".join(printable_line(line) for line in question.split("\n")))
        line = b""
        while not line.endswith(b"\n") and (more := os.read(tty, LINE_BYTES)):
            line += more
    finally:
        if not is_shown:
            _write(tty, "\n")
        termios.tcsetattr(tty, termios.TCSAFLUSH, before)
    return line


def _write(tty: int, text: str) -> None:
    data = text.encode(errors="replace")
    while data:
        data = data[os.write(tty, data) :]


def printable_line(text: str) -> str:
    """Return text of a stranger without what could steer the terminal; spaces stay."""
    return "".join(letter if letter.isprintable() else "?" for letter in text.expandtabs())


def one_line(question: str) -> str:
    """Return a question as a message quotes it."""
    return printable(question).rstrip(" :?")
