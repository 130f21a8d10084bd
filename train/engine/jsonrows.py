"""Rows of JSON files: a row on each line, a list of rows, or an object that holds such a list."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from train.engine import characters
from train.engine.compression import opened

_READ = 2**20
# In characters: a list is read row by row, an object only as a whole.
LARGEST_VALUE = 128 * 2**20


class _Twice(Exception):
    pass


class _TooLarge(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def read_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, row) of a file with a JSON value on each line.

    Raises:
        UserError: a line is not JSON.
    """
    place = ""
    try:
        with opened(file) as stream:
            for number, line in enumerate(stream, start=1):
                place = f":{number}"
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield f"{file}{place}", _DECODER.decode(text)
    except UserError:
        raise
    except _ERRORS as error:
        raise _refusal(file, f"{file}{place}", error, place) from None


def read_document(file: Path, columns: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield (file: row n, row) of a file that is a list of rows, a row in memory at a time.

    It may also be values one after the other, or one object: a row, if it has `columns`, or else
    a wrapper around a single list of rows.

    Raises:
        UserError: it is not JSON.
    """
    where = f"{file}: row 1"
    try:
        with opened(file) as stream:
            scanner = _Scanner(io.TextIOWrapper(stream, "utf-8-sig"))
            for number, row in enumerate(_rows(scanner, columns), start=1):
                yield where, row
                where = f"{file}: row {number + 1}"
    except UserError:
        raise
    except _TooLarge:
        raise UserError(
            f"{where}: is one JSON value of over {LARGEST_VALUE:,} characters; write one row per "
            "line, as .jsonl"
        ) from None
    except _ERRORS as error:
        line = scanner.line_at(error.pos) if isinstance(error, json.JSONDecodeError) else 0
        raise _refusal(file, where, error, f":{line}") from None


# ValueError for a number of thousands of digits, RecursionError for thousands of brackets.
_ERRORS = (_Twice, ValueError, RecursionError)


def _refusal(file: Path, where: str, error: Exception, place: str) -> Exception:
    if isinstance(error, UnicodeDecodeError):
        return characters.refusal(file)
    if isinstance(error, _Twice):
        return UserError(f"{where}: has '{error}' twice in one object; keep one")
    if isinstance(error, json.JSONDecodeError):
        if "\0" in error.doc:
            return characters.refusal(file)
        column = f" (column {error.colno})" if place == where[len(str(file)) :] else ""
        return UserError(f"{file}{place}: is not JSON: {error.msg}{column}")
    return UserError(f"{where}: cannot be parsed as JSON: {error}")


def _rows(scanner: _Scanner, columns: Iterable[str]) -> Iterator[Any]:
    if scanner.next_character() == "[":
        yield from _items(scanner)
    elif scanner.next_character():
        first = scanner.value()
        if isinstance(first, dict) and not scanner.next_character():
            lists = [value for value in first.values() if _is_rows(value)]
            is_row = all(column in first for column in columns)
            yield from [first] if is_row or len(lists) != 1 else lists[0]
            return
        yield first
        while scanner.next_character():
            yield scanner.value()


def _items(scanner: _Scanner) -> Iterator[Any]:
    """Yield the items of a list."""
    scanner.skip("[")
    if scanner.next_character() != "]":
        yield scanner.value()
    while scanner.next_character() == ",":
        scanner.skip(",")
        yield scanner.value()
    scanner.skip("]")
    if scanner.next_character():
        raise scanner.error("Text after the end of the list")


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


class _Scanner:
    """Takes JSON values from a stream, with the text of one at a time in memory."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream
        self._held = ""
        self._at = 0
        self._is_done = False
        self._lines = 1

    def next_character(self) -> str:
        """Return the next non-blank character without consuming it; empty at the end."""
        while True:
            while self._at < len(self._held):
                if self._held[self._at] not in " \t\r\n":
                    return self._held[self._at]
                self._at += 1
            if self._is_done:
                return ""
            self._read_on()

    def skip(self, character: str) -> None:
        if self.next_character() != character:
            raise self.error(f"Expecting '{character}'")
        self._at += 1

    def value(self) -> Any:
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                # The value may continue in text that is not read yet.
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._held) - 16
                if self._is_done or not is_cut:
                    raise
            else:
                if end < len(self._held) or self._is_done:
                    self._at = end
                    return value
            self._read_on()

    def error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._held, self._at)

    def line_at(self, position: int) -> int:
        return self._lines + self._held.count("\n", 0, position)

    def _read_on(self) -> None:
        left = len(self._held) - self._at
        if left > LARGEST_VALUE:
            raise _TooLarge
        # Twice as much each time, so that a long value is not restarted over and over.
        new = self._stream.read(max(_READ, left))
        self._is_done = not new
        self._lines += self._held.count("\n", 0, self._at)
        self._held = self._held[self._at :] + new
        self._at = 0
