"""Rows of csv and tsv files (RFC 4180), or the line where a file is malformed.

Nothing is guessed: a row has as many fields as the first line has names, and a quote encloses a
whole field or is doubled within one. A lenient reader silently cuts texts at their commas.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from runfolder.errors import UserError
from train.engine import characters
from train.engine.compression import opened, rewrite_command

# An unclosed quote makes the rest of the file one field: at most this much of it is kept.
LONGEST_FIELD = 64 * 2**20


class _Lines:
    """The lines of a file, and those of the current row."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream
        self.of_row: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._stream)
        if "\0" in line:
            raise _NotText
        self.of_row.append(line)
        return line


class _NotText(Exception):
    pass


def read(file: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (file:line, fields) of each row, the column names first; blank lines are skipped.

    The line is the one on which the row begins.

    Raises:
        UserError: the file is not CSV, with the line.
    """
    csv.field_size_limit(LONGEST_FIELD)
    try:
        with opened(file) as stream:
            # Spreadsheets begin a file with a mark (BOM) that is not part of the first name.
            lines = _Lines(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
            count = 0
            for where, fields in _rows(file, lines, delimiter):
                count = count or len(fields)
                if len(fields) != count:
                    raise _other_count(where, len(fields), count, lines, delimiter)
                yield where, fields
    except (UnicodeDecodeError, _NotText):
        raise characters.refusal(file) from None


def _rows(file: Path, lines: _Lines, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows that are not blank, as lists of fields, the names too."""
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    field = rf'(?:"(?:[^"]|"")*+"|[^"\r\n{delimiter}]*+)'
    well_quoted = re.compile(rf"{field}(?:{delimiter}{field})*+\r?\n?|.*\r")
    while True:
        where = f"{file}:{reader.line_num + 1}"
        lines.of_row.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _malformed(file, where, str(error), lines, reader.line_num) from None
        if any('"' in field for field in fields) and not well_quoted.fullmatch(
            "".join(lines.of_row)
        ):
            raise UserError(
                f'{where}: has a quote (") in a field that does not begin with one; put the whole '
                f'field in quotes, and write each quote in it twice (""){_backslashes(file, lines)}'
            )
        if fields:
            yield where, fields


def _other_count(where: str, found: int, expected: int, lines: _Lines, delimiter: str) -> UserError:
    mark = "line break" if found < expected else "tab" if delimiter == "\t" else "comma"
    cause = f"put double quotes around a text that contains a {mark}"
    if '\\"' in "".join(lines.of_row):
        cause += ', and write a quote in it twice (""), not as \\"'
    return UserError(
        f"{where}: has {found} fields, but the first line names {expected} columns; {cause}"
    )


def _malformed(file: Path, where: str, reason: str, lines: _Lines, line_num: int) -> UserError:
    hint = _backslashes(file, lines)
    if "end of data" in reason or "field larger" in reason:
        size = "" if "end of data" in reason else f" within {LONGEST_FIELD:,} characters"
        return UserError(
            f"{where}: a quote opens in this row and is not closed{size}; close it, and write a "
            f'quote in a text twice (""){hint}'
        )
    if "expected after" in reason:
        begins = int(where.rpartition(":")[2])
        place = f" in line {line_num}" if line_num > begins else ""
        return UserError(
            f"{where}: a quoted field of this row ends{place} before text other than a comma; "
            f'close its quote, and write a quote in a text twice (""){hint}'
        )
    return UserError(f"{where}: is not CSV: {reason}")


def _backslashes(file: Path, lines: _Lines) -> str:
    if '\\"' not in "".join(lines.of_row[:2]):
        return ""
    command = rewrite_command(file, """sed 's/\\\\"/""/g'""")
    return f"; for backslashes before quotes: {command}"
