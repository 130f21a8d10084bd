"""What the user types to the client itself: ~. and its like, at the start of a line."""

from __future__ import annotations

from enum import Enum

HELP = (
    "Supported escape sequences:\n"
    " {0}.   - end the connection, also a dead one\n"
    " {0}^Z  - suspend; fg comes back\n"
    " {0}?   - this message\n"
    " {0}{0}   - send {0}\n"
    "(They are recognized only after a newline.)\n"
)


class Action(Enum):
    """What the client is told to do."""

    END = "end"
    SUSPEND = "suspend"
    HELP = "help"


ACTIONS = {b".": Action.END, b"\x1a": Action.SUSPEND, b"?": Action.HELP}


class Escapes:
    """Splits what is typed into what goes to the server and what is meant for us."""

    def __init__(self, character: str = "~") -> None:
        """Watch for `character`: one, or ^X for a control character, or "none"."""
        self._escape = _code(character)
        self._at_start = True
        self._is_pending = False
        self.name = character

    def split(self, typed: bytes) -> list[bytes | Action]:
        """Return the pieces of `typed` in their order; an escape character may wait for its next.

        Sequences that are none of ours go to the server as they are.
        """
        if not self._escape:
            return [typed] if typed else []
        pieces: list[bytes | Action] = []
        plain = bytearray()
        for code in typed:
            byte = bytes((code,))
            if self._is_pending:
                self._is_pending = False
                if action := ACTIONS.get(byte):
                    if plain:
                        pieces.append(bytes(plain))
                        plain.clear()
                    pieces.append(action)
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
        if plain:
            pieces.append(bytes(plain))
        return pieces


def _code(character: str) -> bytes:
    if character.lower() == "none":
        return b""
    if len(character) == 2 and character[0] == "^":
        return bytes((ord(character[1].upper()) & 0x1F,))
    return character.encode()
