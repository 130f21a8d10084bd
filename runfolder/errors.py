"""User errors, and text that is safe to show."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_CHOICES = 12


class UserError(ValueError):
    """An error that the user can fix: one line that says where, what is wrong, and what to do."""


def printable(text: str) -> str:
    """Return untrusted text as one line without terminal control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return the end of a message about an unknown `word`: the closest choice, or all of them."""
    known = sorted(choices)
    # The beginning of a name, such as `resume`, is meant for that name and not for a similar one.
    begun = [choice for choice in known if len(word) > 2 and choice.startswith(word)]
    nearest = begun or difflib.get_close_matches(word, known, n=1)
    if nearest:
        return f"; did you mean '{nearest[0]}'?"
    return f"; choose from {', '.join(known)}" if 0 < len(known) <= MOST_CHOICES else ""
