"""Questions to the user, on the terminal, whatever the standard streams are."""

from __future__ import annotations

import os
import termios

from runfolder.errors import UserError, printable

# A line's length in the kernel's line discipline.
LINE_BYTES = 4096
# Indices into what tcgetattr returns.
IFLAG, LFLAG = 0, 3


class Prompts:
    """The user at /dev/tty; to be asked in the main thread, where signals end a question.

    Each question raises a `UserError` if there is no terminal, or no answer (Ctrl+D).
    """

    def ask(self, question: str) -> str:
        """Return the answer to a question, which the terminal shows while it is typed."""
        return _line(question, is_shown=True)

    def secret(self, question: str) -> str:
        """Return the answer to a question, which is not shown."""
        return _line(question, is_shown=False)


def _line(question: str, *, is_shown: bool) -> str:
    try:
        tty = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        raise UserError(
            f"there is no terminal to ask '{one_line(question)}' on; with a key in ssh-agent, or "
            "the host's key in known_hosts, no question is needed"
        ) from None
    try:
        line = _answer(tty, question, is_shown=is_shown)
    except (OSError, termios.error):
        raise UserError(f"the terminal was closed at '{one_line(question)}'") from None
    finally:
        os.close(tty)
    if not line.endswith(b"\n"):
        raise UserError(f"no answer to '{one_line(question)}'")
    return line[:-1].decode(errors="surrogateescape")


def _answer(tty: int, question: str, *, is_shown: bool) -> bytes:
    """Return what was typed, with its newline; the terminal is restored."""
    before = termios.tcgetattr(tty)
    asking = termios.tcgetattr(tty)
    # A line at a time, with editing and signals, whatever was set before.
    asking[IFLAG] |= termios.ICRNL
    asking[LFLAG] |= termios.ICANON | termios.ISIG | termios.ECHO
    if not is_shown:
        asking[LFLAG] &= ~(termios.ECHO | termios.ECHONL)
    line = b""
    try:
        # What was typed before is not an answer to this question.
        termios.tcsetattr(tty, termios.TCSANOW, asking)
        termios.tcflush(tty, termios.TCIFLUSH)
        os.write(tty, "\n".join(map(printable_line, question.split("\n"))).encode())
        while not line.endswith(b"\n") and (more := os.read(tty, LINE_BYTES)):
            line += more
    finally:
        # Not TCSAFLUSH, which waits for a stopped terminal.
        termios.tcsetattr(tty, termios.TCSANOW, before)
        termios.tcflush(tty, termios.TCIFLUSH)
    if not is_shown:
        os.write(tty, b"\n")
    return line


def printable_line(text: str) -> str:
    """Return untrusted text without terminal control characters; spaces stay."""
    return "".join(letter if letter.isprintable() else "?" for letter in text.expandtabs())


def one_line(question: str) -> str:
    """Return a question as a message quotes it."""
    return printable(question).rstrip(" :?")
