"""The user's mistakes, and text that may be shown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_CHOICES = 12


class UserError(ValueError):
    """Something that the user can put right: one line that says what, where, and what to do."""


def printable(text: str) -> str:
    """Return text of any origin as one line in which nothing steers a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return the end of a message about an unknown `word`: the nearest choice, or a few of all."""
    known = sorted(choices)
    nearest = difflib.get_close_matches(word, known, n=1)
    if nearest:
        return f"; did you mean '{nearest[0]}'?"
    return f"; choose from {', '.join(known)}" if 0 < len(known) <= MOST_CHOICES else ""
