"""Gives the terminal back when the client was killed and could not: a small process that waits.

Run as a file by cluster/login/terminal.py, with nothing of this package, so that it starts at once.
Its output is the terminal, and its input the client's words, a line each: what the terminal was
like and what undoes the modes that a remote program left on, or null while the terminal is the
shell's. When the client is gone without a word, the last line holds.

It has a session of its own: what ends the client's process group does not reach it, and no terminal
stops it.
"""

from __future__ import annotations

import json
import os
import sys
import termios

TERMINAL = 1


def main() -> None:
    """Wait until the client has left; then give the terminal back if that is needed."""
    last = b"null"
    for line in sys.stdin.buffer:
        last = line
    if (state := json.loads(last)) is None:
        return
    *flags, characters, undo = state
    attributes = [*flags, [bytes.fromhex(character) for character in characters]]
    termios.tcsetattr(TERMINAL, termios.TCSANOW, attributes)
    if undo:
        termios.tcflush(TERMINAL, termios.TCIFLUSH)
        os.write(TERMINAL, bytes.fromhex(undo))


if __name__ == "__main__":
    main()
