"""cluster/login/modes.py: what was turned on in a terminal, and what turns it off."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.login.modes import Modes

PARTS = [
    *(b"\x1b[?%d%s" % (n, c) for n in (1, 7, 25, 1000, 1006, 1049, 2004) for c in (b"h", b"l")),
    *(b"\x1b[>1u", b"\x1b[<u", b"\x1b[>4;2m", b"\x1b[>4m", b"\x1b[4 q", b"\x1b[0 q"),
    *(b"\x1b=", b"\x1b>"),
    *(b"\x1b[31m", b"\x1b[m", b"\x1b[2;10r", b"\x1b[r", b"\x1b(0", b"\x1b(B", b"\x1bc", b"\x1b[!p"),
    *(b"text", b"\xc3\xa4", b"\x1b", b"\x1b[", b"[?1049h", b"\x1b]0;title\x07"),
]  # fmt: skip
output = st.lists(st.sampled_from(PARTS)).map(b"".join)


def undo(*pieces: bytes) -> bytes:
    modes = Modes()
    for piece in pieces:
        modes.feed(piece)
    return modes.undo()


@pytest.mark.parametrize(
    ("shown", "undone"),
    [
        (b"plain text \xc3\xa4", b""),
        (b"\x1b[?1049h", b"\x1b[?1049l"),
        (b"\x1b[?1049h\x1b[?1049l", b""),
        (b"\x1b[?1000;1006h", b"\x1b[?1000l\x1b[?1006l"),
        (b"\x1b[?25l", b"\x1b[?25h"),
        (b"\x1b[?25l\x1b[?25h", b""),
        (b"\x1b[?12h", b""),
        (b"\x1b[1;31m", b"\x1b[m"),
        (b"\x1b[1;31m\x1b[0m\x1b[39;49m", b""),
        (b"\x1b[>1u\x1b[>5u\x1b[<u", b"\x1b[<1u"),
        (b"\x1b[3;20r", b"\x1b7\x1b[r\x1b8"),
        (b"\x1b(0lqk\x1b(B", b""),
        (b"\x1b[?1049h\x1b[31m\x1b[?2004h\x1bc", b""),
        # The colors and modes belong to the screen that is left.
        (b"\x1b[?1049h\x1b[?1h\x1b=\x1b[7m", b"\x1b[?1l\x1b>\x1b[m\x1b[?1049l"),
    ],
)
def test_only_what_was_turned_on_is_turned_off(shown: bytes, undone: bytes) -> None:
    assert undo(shown) == undone


def test_margins_around_the_whole_screen_are_none() -> None:
    modes = Modes()
    modes.rows = 24
    modes.feed(b"\x1b[1;24r")
    assert modes.undo() == b""
    modes.feed(b"\x1b[1;23r")
    assert modes.undo() != b""


@given(output)
def test_what_undoes_leaves_nothing_to_undo(shown: bytes) -> None:
    modes = Modes()
    modes.feed(shown)
    modes.feed(b"\x18" + modes.undo())
    assert modes.undo() == b""


@given(output, st.lists(st.integers(0, 200)))
def test_it_does_not_matter_where_the_output_is_cut(shown: bytes, cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), len(shown) + 200]
    pieces = [shown[a:b] for a, b in itertools.pairwise(ends)]
    assert undo(*pieces) == undo(shown)


@given(st.binary())
def test_any_bytes_can_be_shown(shown: bytes) -> None:
    undo(shown, shown)
