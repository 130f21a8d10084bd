"""cluster/login/prompts.py: the terminal is given back whatever comes, and when."""

from __future__ import annotations

import os
import pty
import signal
import termios
from collections.abc import Iterator

import pytest

from cluster.login import prompts

ECHO = 3


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Return a terminal that is /dev/tty to us."""
    master, slave = pty.openpty()
    real = os.open

    def open_terminal(path: str, flags: int) -> int:
        assert path == "/dev/tty"
        return real(os.ttyname(slave), flags)

    monkeypatch.setattr(prompts.os, "open", open_terminal)
    yield slave
    os.close(master)
    os.close(slave)


def test_ctrl_c_gives_the_terminal_back(terminal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = termios.tcgetattr(terminal)
    silent: list[bool] = []

    def read(fd: int, size: int) -> bytes:
        silent.append(not termios.tcgetattr(terminal)[ECHO] & termios.ECHO)
        signal.raise_signal(signal.SIGINT)
        return b""

    monkeypatch.setattr(prompts.os, "read", read)
    with pytest.raises(KeyboardInterrupt):
        prompts.Prompts().secret("Password: ")
    assert silent == [True]
    assert termios.tcgetattr(terminal) == before


def test_a_raw_terminal_is_asked_line_by_line(
    terminal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = termios.tcgetattr(terminal)
    asked[0] &= ~termios.ICRNL
    asked[ECHO] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(terminal, termios.TCSANOW, asked)
    asked = termios.tcgetattr(terminal)
    while_asked = []

    def read(fd: int, size: int) -> bytes:
        while_asked.extend(termios.tcgetattr(terminal))
        return b"yes\n"

    monkeypatch.setattr(prompts.os, "read", read)
    assert prompts.Prompts().ask("Sure? ") == "yes"
    assert while_asked[0] & termios.ICRNL
    assert while_asked[ECHO] & termios.ICANON and while_asked[ECHO] & termios.ECHO
    assert termios.tcgetattr(terminal) == asked
