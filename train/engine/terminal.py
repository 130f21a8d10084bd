"""Text on a terminal: what others wrote must not steer it."""

from __future__ import annotations

import sys
import unicodedata

from runfolder.errors import UserError


def printable(text: str) -> str:
    """Return a text that is safe to print: control characters are escaped (\\x1b).

    Line ends and tabs stay. Marks that change the direction of writing are escaped as well: with
    them, a line can look different from what it is.
    """
    return "".join(ascii(char)[1:-1] if _steers(char) else char for char in text)


def _steers(char: str) -> bool:
    if char in "\n\t":
        return False
    # Control characters, halves of characters, marks that end a line or a paragraph.
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _DIRECTIONS


_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def show(text: str, end: str = "\n") -> None:
    """Print a text at once: unchanged into a file or a pipe, `printable` on a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def check_utf8(text: str, name: str) -> None:
    """Raise `UserError` if a text from the command line or a terminal was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}: is not UTF-8 text; check the terminal's encoding") from None
