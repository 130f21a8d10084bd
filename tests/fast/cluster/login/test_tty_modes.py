"""cluster/login/tty_modes.py: a terminal's settings as SSH encodes them."""

from __future__ import annotations

import os
import struct
import subprocess
import termios

from cluster.login import tty_modes


def decoded(data: bytes) -> dict[int, int]:
    assert data[-1] == 0
    return dict(struct.iter_unpack(">BI", data[:-1]))


def settings(*words: str) -> dict[int, int]:
    """Return what is sent for a terminal that stty was told this."""
    master, slave = os.openpty()
    subprocess.run(["stty", *words], stdin=slave, check=True)
    found = decoded(tty_modes.encode(termios.tcgetattr(slave)))
    os.close(master)
    os.close(slave)
    return found


def test_a_terminals_settings_are_told() -> None:
    one = settings("erase", "^H", "intr", "^X", "iutf8", "susp", "undef")
    other = settings("erase", "^?", "intr", "^C", "-iutf8")
    # RFC 4254, section 8: VINTR, VERASE, VSUSP, IUTF8.
    assert [one[code] for code in (1, 3, 10, 42)] == [24, 8, 255, 1]
    assert [other[code] for code in (1, 3, 10, 42)] == [3, 127, 26, 0]


def test_a_raw_terminal_can_be_told() -> None:
    assert settings("raw", "erase", "^H")[3] == 8
