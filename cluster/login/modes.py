"""What a remote program turned on in the terminal, and what turns it off again.

After a lost connection nobody else does: a mouse that types, an alternate screen, a hidden cursor
stay. What nobody turned on is left alone, because resetting it has effects of its own: leaving an
alternate screen that was never entered moves the cursor.
"""

from __future__ import annotations

import re

# DEC private modes that are off in a terminal at rest: of keys and screen, of the mouse, bracketed
# paste, synchronized output, reports of focus, theme and size.
OFF_AT_REST = frozenset(
    (1, 5, 6, 9, 47, 66, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1015, 1016, 1047, 1049)
) | {2004, 2026, 2027, 2031, 2048}
# Wrapping, and a cursor that is seen.
ON_AT_REST = frozenset((7, 25))
ALTERNATE_SCREENS = frozenset((47, 1047, 1049))

# Colors and attributes that end single ones, and so turn nothing on.
PARTS_RESET = frozenset((22, 23, 24, 25, 27, 28, 29, 39, 49))

SEQUENCE = re.compile(
    rb"\x1b(?:\[(?P<private>[<-?]?)(?P<numbers>[0-9;:]*)(?P<between>[ -/]*)(?P<final>[@-~])"
    rb"|(?P<charset>\(.)|(?P<other>[=>c]))",
    re.DOTALL,
)
# The end of a piece that may be the beginning of a sequence.
UNFINISHED = re.compile(rb"\x1b(?:\[[<-?]?[0-9;:]{0,64}[ -/]{0,4}|\()?\Z")


class Modes:
    """Reads along with what the terminal is given."""

    def __init__(self) -> None:
        self.rows = 0
        """Of the terminal, as far as it is known: margins around all of it are none."""
        self._rest = b""
        self._clear()

    def _clear(self) -> None:
        self._private: set[int] = set()
        self._has_color = False
        self._has_margins = False
        self._has_graphics = False
        self._has_keypad = False
        self._has_cursor_shape = False
        self._modify_keys = False
        self._keyboards = 0

    def feed(self, data: bytes) -> bool:
        """Take note of a piece of output; return whether `undo` may have changed by it.

        Sequences may be cut anywhere.
        """
        if self._rest:
            data, self._rest = self._rest + data, b""
        elif b"\x1b" not in data:
            return False
        for found in SEQUENCE.finditer(data):
            self._note(found)
        if unfinished := UNFINISHED.search(data, max(0, len(data) - 80)):
            self._rest = unfinished[0]
        return True

    def undo(self) -> bytes:
        """Return what brings the terminal to rest; empty when it is."""
        parts = []
        off = sorted(self._private & OFF_AT_REST - ALTERNATE_SCREENS)
        parts += [b"\x1b[?%dl" % number for number in off]
        if self._keyboards:
            parts.append(b"\x1b[<%du" % self._keyboards)
        if self._modify_keys:
            parts.append(b"\x1b[>4m")
        if self._has_keypad:
            parts.append(b"\x1b>")
        if self._has_margins:
            # Without margins the cursor goes home: it is saved around it.
            parts.append(b"\x1b7\x1b[r\x1b8")
        if self._has_graphics:
            parts.append(b"\x1b(B")
        parts += [b"\x1b[?%dh" % number for number in sorted(self._private & ON_AT_REST)]
        if self._has_cursor_shape:
            parts.append(b"\x1b[0 q")
        if self._has_color:
            parts.append(b"\x1b[m")
        # Last, as what comes before belongs to the screen that is left.
        screens = sorted(self._private & ALTERNATE_SCREENS)
        parts += [b"\x1b[?%dl" % number for number in screens]
        return b"".join(parts)

    def _note(self, found: re.Match[bytes]) -> None:
        if (charset := found["charset"]) is not None:
            self._has_graphics = charset != b"(B"
        elif (other := found["other"]) is not None:
            if other == b"c":  # a full reset
                self._clear()
            else:
                self._has_keypad = other == b"="
        else:
            kind = (found["private"], found["between"], found["final"])
            self._note_control(kind, found["numbers"])

    def _note_control(self, kind: tuple[bytes, bytes, bytes], text: bytes) -> None:
        numbers = [int(part) for part in re.split(b"[;:]", text) if part and len(part) < 6]
        match kind:
            case (b"?", b"", (b"h" | b"l") as final):
                self._note_private(numbers, is_on=final == b"h")
            case (b"", b"", b"m"):
                if telling := [number for number in numbers or [0] if number not in PARTS_RESET]:
                    self._has_color = any(telling)
            case (b"", b"", b"r"):
                self._has_margins = numbers not in ([], [1, self.rows])
            case (b"", b" ", b"q"):
                self._has_cursor_shape = numbers not in ([], [0])
            case (b"", b"!", b"p"):  # a soft reset
                self._private -= {1, 6, 7, 25, 66}
                self._has_color = self._has_margins = self._has_keypad = False
            case (b">", b"", b"m"):
                if numbers[:1] == [4]:
                    self._modify_keys = numbers[1:] not in ([], [0])
            case (b">", b"", b"u"):
                self._keyboards += 1
            case (b"<", b"", b"u"):
                self._keyboards = max(0, self._keyboards - (numbers or [1])[0])
            case _:
                pass

    def _note_private(self, numbers: list[int], *, is_on: bool) -> None:
        for number in numbers:
            if number in OFF_AT_REST:
                (self._private.add if is_on else self._private.discard)(number)
            elif number in ON_AT_REST:
                (self._private.discard if is_on else self._private.add)(number)
