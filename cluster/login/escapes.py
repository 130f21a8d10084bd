"""What the user types to the client itself: ~. and its like, at the start of a line."""

from __future__ import annotations

from enum import Enum

HELP = """Supported escape sequences:
 {0}.   - end the connection, also a dead one
 {0}^Z  - suspend; fg comes back
 {0}?   - this message
 {0}{0}   - send {0}
(They are recognized only after a newline.)"""


class Action(Enum):
    """What the client is told to do."""

    END = b"."
    SUSPEND = b"\x1a"
    HELP = b"?"


class Escapes:
    """Splits what is typed into what goes to the server and what is meant for us."""

    def __init__(self, character: str = "~") -> None:
        """Watch for `character`: one, or ^X for a control character, or "none"."""
        self._escape = character.encode() if character != "none" else b""
        if len(character) == 2 and character[0] == "^":
            self._escape = bytes((ord(character[1].upper()) & 0x1F,))
        self._at_start = True
        self._is_pending = False
        self.name = character

    def split(self, typed: bytes) -> list[bytes | Action]:
        """Return the pieces of `typed` in their order; an escape character may wait for its next.

        Sequences that are none of ours go to the server as they are.
        """
        if not self._escape:
            return [typed]
        pieces: list[bytes | Action] = []
        plain = bytearray()
        for code in typed:
            byte = bytes((code,))
            if self._is_pending:
                self._is_pending = False
                if any(byte == action.value for action in Action):
                    pieces += [bytes(plain), Action(byte)]
                    plain.clear()
                    # As in ssh: after one of them another may follow at once.
                    self._at_start = True
                    continue
                if byte != self._escape:
                    plain += self._escape
            elif self._at_start and byte == self._escape:
                self._is_pending = True
                continue
            plain += byte
            self._at_start = byte in b"\r\n"
        return [piece for piece in (*pieces, bytes(plain)) if piece]
