"""cluster/login/escapes.py: what is typed to the client, and what to the server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.login.escapes import Escapes

typed = st.lists(st.sampled_from([b"~", b".", b"\r", b"\n", b"a", b"\xc3"]), max_size=20).map(
    b"".join
)


def passed(text: bytes, character: str = "~") -> tuple[bytes, bool]:
    """Return what goes to the server, and whether that is the end."""
    escapes = Escapes(character)
    return escapes.pass_on(text), escapes.has_ended


@pytest.mark.parametrize(
    ("text", "goes_on", "is_end"),
    [
        (b"ls\r", b"ls\r", False),
        (b"~.", b"", True),
        (b"ls\r~.more", b"ls\r", True),
        (b"\n~.", b"\n", True),
        (b"a~.", b"a~.", False),
        (b"~~.", b"~.", False),
        (b"~~~.", b"~~.", False),
        (b"~x", b"~x", False),
        (b"~\r~.", b"~\r", True),
        (b"~", b"", False),
    ],
)
def test_sequences(text: bytes, goes_on: bytes, is_end: bool) -> None:
    assert passed(text) == (goes_on, is_end)


def test_other_characters_and_none() -> None:
    assert passed(b"~.\r\x02.", "^B") == (b"~.\r", True)
    assert passed(b"\x02\x02", "^b") == (b"\x02", False)
    assert passed(b"~.", "none") == (b"~.", False)


@given(typed, st.data())
def test_it_does_not_matter_where_the_input_is_cut(text: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    escapes = Escapes("~")
    pieces = escapes.pass_on(text[:cut])
    pieces += b"" if escapes.has_ended else escapes.pass_on(text[cut:])
    assert (pieces, escapes.has_ended) == passed(text)


@given(st.binary())
def test_without_the_character_nothing_is_changed(text: bytes) -> None:
    text = text.replace(b"~", b"")
    assert passed(text) == (text, False)
