"""What the user types for the client itself: ~. at the start of a line ends it."""

from __future__ import annotations


class Escapes:
    """Separates what is typed for the server from what is meant for us."""

    def __init__(self, character: str = "~") -> None:
        """Watch for `character`: one, or ^X for a control character, or "none"."""
        self._escape = character.encode() if character != "none" else b""
        if len(character) == 2 and character[0] == "^":
            self._escape = bytes((ord(character[1].upper()) & 0x1F,))
        self._at_start = True
        self._is_pending = False
        self.name = character
        self.has_ended = False
        """The user has asked to disconnect."""

    def pass_on(self, typed: bytes) -> bytes:
        """Return the part of `typed` for the server; an escape character waits for the next one.

        Typed twice, it is sent once; before another character, both are sent.
        """
        if not self._escape:
            return typed
        plain = bytearray()
        for code in typed:
            byte = bytes((code,))
            if self._is_pending:
                self._is_pending = False
                if byte == b".":
                    self.has_ended = True
                    break
                if byte != self._escape:
                    plain += self._escape
            elif self._at_start and byte == self._escape:
                self._is_pending = True
                continue
            plain += byte
            self._at_start = byte in b"\r\n"
        return bytes(plain)
