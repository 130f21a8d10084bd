"""Where text comes from: local files, and the embedded sample; hub.py has the datasets.

Text streams through here in pieces, so that memory does not grow with the corpus.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.engine.errors import UserError

SAMPLES = Path(__file__).parent.parent / "samples"
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
PIECE_CHARACTERS = 64 * 1024


@dataclass(frozen=True)
class Piece:
    """A stretch of a document, and whether the document starts or ends with it."""

    text: str
    starts: bool
    ends: bool


def text_files(path: Path, setting: str) -> list[Path]:
    """Return the text files that `path` (a file or a folder) stands for, in a fixed order.

    Raises:
        UserError: there is none, or its kind is unknown.
    """
    path = path.expanduser()
    if path.is_dir():
        # Editors and notebooks keep copies in hidden folders.
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in SUFFIXES
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise UserError(f"{setting}: {path} holds no {', '.join(SUFFIXES)} file")
        return files
    if not path.exists():
        raise UserError(f"{setting}: {path} does not exist")
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{setting}: {path} is of no kind that is read; convert it to {', '.join(SUFFIXES)}"
        )
    return [path]


def pieces(files: Iterable[Path], *, text_column: str, join_rows: bool) -> Iterator[Piece]:
    """Yield the text of local files.

    A txt file is one document; a row of the others is one, unless `join_rows` makes the rows of
    a file the lines of one document.

    Raises:
        UserError: a file that is not what its name says, or lacks the column; with its line.
    """
    for file in files:
        if file.suffix == ".txt":
            yield from running_text(_characters(file))
        else:
            yield from from_rows(_ROWS[file.suffix](file, text_column), join_rows=join_rows)


def from_rows(rows: Iterable[str], *, join_rows: bool) -> Iterator[Piece]:
    """Yield rows as documents of their own, or as the lines of one document."""
    if join_rows:
        yield from running_text(row if row.endswith("\n") else row + "\n" for row in rows)
        return
    for row in rows:
        if row.strip():
            # A long row comes in pieces too: a book in one line would take gigabytes to tokenize.
            size = PIECE_CHARACTERS
            yield from running_text(row[i : i + size] for i in range(0, len(row), size))


def running_text(stretches: Iterable[str]) -> Iterator[Piece]:
    """Yield one document in pieces of about 64 Ki characters, cut at ends of lines.

    A cut costs at most one token: some tokenizers put a space before the first word of a piece.
    """
    held, starts = "", True
    for stretch in stretches:
        held += stretch
        while len(held) >= PIECE_CHARACTERS:
            cut = held.rfind("\n", 0, PIECE_CHARACTERS) + 1
            cut = cut or held.rfind(" ", 0, PIECE_CHARACTERS) or PIECE_CHARACTERS
            cut = cut if cut > 0 else PIECE_CHARACTERS
            yield Piece(held[:cut], starts=starts, ends=False)
            held, starts = held[cut:], False
    if held or not starts:
        yield Piece(held, starts=starts, ends=True)


def as_text(value: Any, where: str, column: str) -> str:
    """Return a row's value; a null is a row without text.

    Raises:
        UserError: it is not text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: '{column}' is not text but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: '{column}' holds half a character (a lone surrogate)") from None
    return value


def no_column(where: str, column: str, columns: Iterable[str]) -> UserError:
    """Return the error for rows that lack the text column, with the columns that they have."""
    names = [str(name) for name in columns]
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    hint = f"; choose from {shown} with --data.text_column" if names else ""
    return UserError(f"{where}: has no column '{column}'{hint}")


def _characters(file: Path) -> Iterator[str]:
    """Yield a file's text with every byte of it, line ends too, so that bits per byte hold."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    try:
        with file.open("rb") as stream:
            data = b"first"
            while data:
                data = stream.read(64 * 1024)
                stretch = decoder.decode(data, final=not data)
                if "\x00" in stretch:
                    line += stretch[: stretch.index("\x00")].count("\n")
                    raise UserError(f"{file}:{line}: is not text: it holds a zero byte")
                line += stretch.count("\n")
                yield stretch
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise _not_utf8(f"{file}:{line}", error) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{where}: is not UTF-8 text ({error.reason}); convert it, such as with iconv -t UTF-8"
    )


def _jsonl_rows(file: Path, column: str) -> Iterator[str]:
    where = str(file)
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                where = f"{file}:{number}"
                if not line.strip():
                    continue
                row = json.loads(line.decode("utf-8-sig"))
                if not isinstance(row, dict):
                    raise UserError(f'{where}: is not an object such as {{"{column}": "..."}}')
                if column not in row:
                    raise no_column(where, column, row)
                yield as_text(row[column], where, column)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON that can be read: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _csv_rows(file: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    where = str(file)
    try:
        # Spreadsheets begin a file with a mark (BOM) that is not part of the first column's name.
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if not reader.fieldnames:
                raise UserError(f"{file}: is empty; its first line names the columns")
            if column not in reader.fieldnames:
                raise no_column(str(file), column, reader.fieldnames)
            for row in reader:
                where = f"{file}:{reader.line_num}"
                if row[column] is None:
                    raise UserError(f"{where}: has fewer columns than the first line")
                yield as_text(row[column], where, column)
    except UnicodeDecodeError as error:
        raise _not_utf8(str(file), error) from None
    except csv.Error as error:
        raise UserError(f"{where}: is not CSV: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _parquet_rows(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Otherwise it reads a whole row group ahead, which can be the whole file.
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
        if column not in table.schema_arrow.names:
            raise no_column(str(file), column, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=1000, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield as_text(value, str(file), column)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: is damaged, or not a parquet file: {reason}") from None


_ROWS = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
