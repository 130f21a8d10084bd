"""Files that are written completely or not at all, and reading files that may be damaged."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from runfolder.errors import printable

# A line of metrics.jsonl has a few hundred bytes; the file of a run of weeks, many megabytes.
TAIL_BYTES = 65536


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content atomically: a reader sees all of the old text or all of the new.

    On a full disk the old text stays.

    Raises:
        OSError: it cannot be written.
    """
    # A unique name, because two processes may write at once.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file's content with a JSON object, as `write_atomically` does."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def append_json(path: Path, content: dict[str, Any]) -> None:
    """Append a JSON object as a line.

    Raises:
        OSError: it cannot be written.
    """
    # An editor may have removed the newline at the end of the last line.
    is_cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as stream:
        stream.write("\n" * is_cut + json.dumps(content) + "\n")


def json_object(content: bytes) -> dict[str, Any]:
    """Return a JSON object; {} if it is damaged or something else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; {} if it is damaged, None if there is no file."""
    try:
        # Listed, not just opened: an NFS client may cache for a while that a file does not exist.
        if path.name not in os.listdir(path.parent):  # noqa: PTH208 only names are needed
            return None
        return json_object(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return {}


def last_lines(path: Path) -> list[bytes]:
    """Return the complete lines in the last `TAIL_BYTES` of a file."""
    try:
        with path.open("rb") as stream:
            start = max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES)
            stream.seek(start)
            lines = stream.read(TAIL_BYTES).split(b"\n")
    except OSError:
        return []
    return lines[1 if start else 0 : -1]


def text(value: object) -> str:
    """Return a text as one line that is safe to show, without terminal control characters."""
    return printable(value) if isinstance(value, str) else ""


def number(value: object) -> int | None:
    """Return a whole number, at least 0, or None if the value is something else."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    return None
