"""The user's mistakes on the laptop's side: one line on stderr, exit 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user can put right: one line that says what, where, and what to do."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return the end of a message about an unknown `word`: the nearest choice, or all of them."""
    known = sorted(choices)
    nearest = difflib.get_close_matches(word, known, n=1)
    if nearest:
        return f"; did you mean '{nearest[0]}'?"
    return f"; choose from {', '.join(known)}"
