"""OpenSSH's patterns: * and ?, lists of them, and ! for what is left out (man ssh_config)."""

from __future__ import annotations

from collections.abc import Iterable


def matches(text: bytes, pattern: bytes) -> bool:
    """Return whether all of `text` is what the pattern describes, in time linear in each star."""
    at = here = 0
    star, after_star = -1, 0
    while at < len(text):
        if here < len(pattern) and pattern[here : here + 1] == b"*":
            star, after_star = here, at
            here += 1
        elif here < len(pattern) and pattern[here : here + 1] in (b"?", text[at : at + 1]):
            at, here = at + 1, here + 1
        elif star >= 0:
            # The last star takes one byte more.
            after_star += 1
            at, here = after_star, star + 1
        else:
            return False
    return not pattern[here:].strip(b"*")


def matches_any(text: bytes, patterns: Iterable[bytes]) -> bool:
    """Return whether a pattern describes `text` and none with a ! before it does."""
    found = False
    for pattern in patterns:
        if pattern.startswith(b"!"):
            if matches(text, pattern[1:]):
                return False
        elif matches(text, pattern):
            found = True
    return found
