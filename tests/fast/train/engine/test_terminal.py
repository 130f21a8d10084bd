"""What others wrote, on a terminal."""

from __future__ import annotations

from train.engine.terminal import printable


def test_what_would_steer_a_terminal_is_written_out() -> None:
    steering = "\x1b[2J\x07\r\x9b31m\u202eevil\u2066\u2028\ud800\x7f"
    shown = printable(f"caf\u00e9 \u6d77 \U0001f41d\tand\n{steering}")
    assert shown.startswith("caf\u00e9 \u6d77 \U0001f41d\tand\n\\x1b[2J\\x07\\r\\x9b31m\\u202eevil")
    assert not set(shown) & set(steering) - set("[2J31mevil")
    shown.encode()
