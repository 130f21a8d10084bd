"""What SSH tells of a terminal's settings: its keys, and that it speaks UTF-8.

Without them Backspace may be another key there, and one that erases a byte of an accented letter.
"""

from __future__ import annotations

import struct
import termios
from typing import Any

# RFC 4254, section 8.
CHARACTERS = {1: "VINTR", 2: "VQUIT", 3: "VERASE", 4: "VKILL", 5: "VEOF"}
CHARACTERS |= {8: "VSTART", 9: "VSTOP", 10: "VSUSP", 13: "VWERASE", 14: "VLNEXT"}
DISABLED = 255
# RFC 8160. Python 3.11 has no name for the bit, which is the same on Linux and macOS.
UTF8_MODE, IUTF8 = 42, 0x4000


def encode(attributes: list[Any]) -> bytes:
    """Return the settings that tcgetattr returned as a server takes them with a pty request."""
    pairs = [(UTF8_MODE, int(bool(attributes[0] & IUTF8)))]
    for code, name in CHARACTERS.items():
        if (index := getattr(termios, name, None)) is not None:
            character = attributes[6][index]
            value = character[0] if isinstance(character, bytes) else character
            pairs.append((code, value or DISABLED))
    return b"".join(struct.pack(">BI", *pair) for pair in pairs) + b"\0"
