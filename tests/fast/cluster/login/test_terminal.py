"""cluster/login/terminal.py: a terminal is given back, and one that has gone raises nothing."""

from __future__ import annotations

import os
import pty
import termios

import pytest

from cluster.login import terminal


def test_a_terminal_is_raw_within_and_as_it_was_after_any_end() -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    with pytest.raises(KeyboardInterrupt), terminal.raw(slave):
        within = termios.tcgetattr(slave)
        raise KeyboardInterrupt
    assert termios.tcgetattr(slave) == before
    assert not within[0] & (termios.ICRNL | termios.IXON)
    assert not within[1] & termios.OPOST
    assert not within[3] & (termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN)
    os.close(master)
    os.close(slave)


def test_a_window_that_was_closed_is_no_error() -> None:
    master, slave = pty.openpty()
    with terminal.raw(slave):
        os.close(master)
        assert terminal.size(slave) == (80, 24)
    os.close(slave)
