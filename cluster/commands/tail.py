"""Show files as they grow."""

from __future__ import annotations

import select
import sys
from pathlib import Path

from runfolder.errors import UserError

BLOCK_BYTES = 1 << 20


class Screen:
    """Standard output: the logs' bytes unchanged, with our own lines between them."""

    def __init__(self) -> None:
        self._source: Path | None = None
        self._within_line = False

    def show(self, source: Path, data: bytes) -> None:
        """Show new data from a file."""
        if self._within_line and source != self._source:
            # Another file's output must not continue this one's unfinished line.
            data = b"\n" + data
        self._source, self._within_line = source, not data.endswith(b"\n")
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def has_reader(self) -> bool:
        """Return whether the output is still read; otherwise only the next line would tell.

        A run may be silent for hours after the connection to a laptop was lost.
        """
        poll = select.poll()
        # Errors are always reported.
        poll.register(sys.stdout.fileno(), 0)
        return not poll.poll(0)

    def say(self, line: str) -> None:
        """Print a line of our own."""
        print(f"\n{line}" if self._within_line else line, flush=True)
        self._within_line = False


class Tail:
    """A file that grows, perhaps on NFS, and may not exist yet: reopened each time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def show(self, screen: Screen) -> bool:
        """Show what was added; return whether anything was."""
        came = False
        while data := self._more():
            screen.show(self._path, data)
            came = True
        return came

    def show_first(self, screen: Screen, beginnings: tuple[bytes, ...]) -> None:
        """Show the first lines, as long as they begin with one of these prefixes."""
        shown = 0
        for line in self._more().splitlines(keepends=True):
            if not line.startswith(beginnings):
                break
            screen.show(self._path, line)
            shown += len(line)
        self._offset = shown

    def _more(self) -> bytes:
        try:
            with self._path.open("rb") as stream:
                # If the file is shorter for now, this reads nothing.
                stream.seek(self._offset)
                data = stream.read(BLOCK_BYTES)
        except PermissionError:
            raise UserError(f"{self._path}: cannot be read: permission denied") from None
        except OSError:
            # Not there yet, or replaced on NFS: try again next time.
            return b""
        self._offset += len(data)
        return data
