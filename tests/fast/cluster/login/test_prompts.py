"""cluster/login/prompts.py: the terminal is given back whatever comes, and when."""

from __future__ import annotations

import os
import pty
import signal
import termios
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.login import prompts


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


def test_ctrl_c_twice_still_gives_the_terminal_back(
    terminal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = prompts._set, termios.tcgetattr(terminal)

    def set_interrupted(tty: int, attributes: list[Any]) -> None:
        # The first when it is silent, the second before it is given back.
        if attributes == before:
            signal.raise_signal(signal.SIGINT)
        real(tty, attributes)
        if attributes != before:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(prompts, "_set", set_interrupted)
    with pytest.raises(KeyboardInterrupt):
        prompts.Terminal().secret("Password: ")
    assert termios.tcgetattr(terminal) == before
