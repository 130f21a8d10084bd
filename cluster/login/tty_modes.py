"""A terminal's settings in the words of SSH, so that the far side's terminal is like this one.

Without them Backspace may be another key there, and one that erases a byte of an accented letter.
"""

from __future__ import annotations

import struct
import termios
from typing import Any

# RFC 4254, section 8, and IUTF8 of RFC 8160; 1 to 18 are control characters.
CHARACTERS = {
    1: "VINTR",
    2: "VQUIT",
    3: "VERASE",
    4: "VKILL",
    5: "VEOF",
    6: "VEOL",
    7: "VEOL2",
    8: "VSTART",
    9: "VSTOP",
    10: "VSUSP",
    12: "VREPRINT",
    13: "VWERASE",
    14: "VLNEXT",
    18: "VDISCARD",
}
# By the index in what tcgetattr returns.
FLAGS = {
    0: {
        30: "IGNPAR",
        31: "PARMRK",
        32: "INPCK",
        33: "ISTRIP",
        34: "INLCR",
        35: "IGNCR",
        36: "ICRNL",
        38: "IXON",
        39: "IXANY",
        40: "IXOFF",
        41: "IMAXBEL",
    },
    3: {
        50: "ISIG",
        51: "ICANON",
        53: "ECHO",
        54: "ECHOE",
        55: "ECHOK",
        56: "ECHONL",
        57: "NOFLSH",
        58: "TOSTOP",
        59: "IEXTEN",
        60: "ECHOCTL",
        61: "ECHOKE",
    },
    1: {70: "OPOST", 72: "ONLCR", 73: "OCRNL", 74: "ONOCR", 75: "ONLRET"},
    2: {90: "CS7", 91: "CS8", 92: "PARENB", 93: "PARODD"},
}
UTF8_MODE = 42
# Python 3.11 has no name for it; the same bit on Linux and macOS.
IUTF8 = 0x4000
INPUT_SPEED, OUTPUT_SPEED = 128, 129
DISABLED = 255
BITS_PER_SECOND = 38400


def encode(attributes: list[Any]) -> bytes:
    """Return the settings that tcgetattr returned as a server takes them with a pty request."""
    pairs = [(OUTPUT_SPEED, BITS_PER_SECOND), (INPUT_SPEED, BITS_PER_SECOND)]
    for code, name in CHARACTERS.items():
        if (index := getattr(termios, name, None)) is not None:
            character = attributes[6][index]
            value = character[0] if isinstance(character, bytes) else character
            pairs.append((code, value or DISABLED))
    for field, flags in FLAGS.items():
        for code, name in flags.items():
            if (bit := getattr(termios, name, None)) is not None:
                pairs.append((code, int(attributes[field] & bit == bit)))
    pairs.append((UTF8_MODE, int(bool(attributes[0] & IUTF8))))
    return b"".join(struct.pack(">BI", *pair) for pair in pairs) + b"\0"
