"""cluster/login/escapes.py: what is typed to the client, and what to the server."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.login.escapes import Action, Escapes

typed = st.lists(st.sampled_from([b"~", b".", b"?", b"\x1a", b"\r", b"\n", b"a"])).map(b"".join)


def split(text: bytes, character: str = "~") -> list[bytes | Action]:
    return Escapes(character).split(text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (b"ls\r", [b"ls\r"]),
        (b"~.", [Action.END]),
        (b"\r~.", [b"\r", Action.END]),
        (b"\n~.", [b"\n", Action.END]),
        (b"a~.", [b"a~."]),
        (b"~~.", [b"~."]),
        (b"~~~.", [b"~~."]),
        (b"~x", [b"~x"]),
        (b"~\r~.", [b"~\r", Action.END]),
        (b"~?~?", [Action.HELP, Action.HELP]),
        (b"ls\r~\x1amore", [b"ls\r", Action.SUSPEND, b"more"]),
        (b"~", []),
    ],
)
def test_sequences(text: bytes, pieces: list[bytes | Action]) -> None:
    assert split(text) == pieces


def test_other_characters_and_none() -> None:
    assert split(b"~.\r\x02.", "^B") == [b"~.\r", Action.END]
    assert split(b"\x02\x02", "^b") == [b"\x02"]
    assert split(b"~.", "none") == [b"~."]


@given(typed, st.data())
def test_it_does_not_matter_where_the_input_is_cut(text: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    escapes = Escapes("~")
    pieces = [*escapes.split(text[:cut]), *escapes.split(text[cut:])]
    assert joined(pieces) == joined(split(text))


@given(st.binary())
def test_without_the_character_nothing_is_changed(text: bytes) -> None:
    text = text.replace(b"~", b"")
    assert b"".join(p for p in split(text) if isinstance(p, bytes)) == text


def joined(pieces: list[bytes | Action]) -> list[bytes | Action]:
    """Return the pieces with those beside each other put together."""
    found: list[bytes | Action] = []
    for is_text, group in itertools.groupby(pieces, key=lambda piece: isinstance(piece, bytes)):
        if is_text:
            found.append(b"".join(piece for piece in group if isinstance(piece, bytes)))
        else:
            found += group
    return found
