"""cluster/login/terminal.py: a terminal that has gone raises nothing."""

from __future__ import annotations

import os
import pty

from cluster.login.terminal import Size, Terminal


def test_a_window_that_was_closed_is_no_error() -> None:
    master, slave = pty.openpty()
    terminal = Terminal(slave)
    os.close(master)
    terminal.make_raw()
    assert terminal.size() == Size(80, 24)
    terminal.restore()
    os.close(slave)


def test_modes_that_cannot_be_turned_off_are_left_to_the_guardian() -> None:
    master, slave = pty.openpty()
    with Terminal(slave) as terminal:
        terminal.note(b"\x1b[?25l")
        terminal.reset_modes(lambda undo: False)
    # It has waited for the guardian.
    assert os.read(master, 100) == b"\x1b[?25h"
    with Terminal(slave) as terminal:
        terminal.note(b"\x1b[?25l")
        terminal.reset_modes(lambda undo: os.write(slave, b"%d\n" % len(undo)) > 0)
    assert os.read(master, 100).split() == [b"6"]
    os.close(master)
    os.close(slave)
