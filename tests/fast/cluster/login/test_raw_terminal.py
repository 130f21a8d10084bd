"""cluster/login/terminal.py: a terminal that has gone raises nothing."""

from __future__ import annotations

import os
import pty

from cluster.login.terminal import Terminal


def test_a_window_that_was_closed_is_no_error() -> None:
    master, slave = pty.openpty()
    terminal = Terminal(slave)
    os.close(master)
    terminal.make_raw()
    assert terminal.size() == os.terminal_size((80, 24))
    terminal.restore()
    os.close(slave)
