"""Where text comes from: local files, a dataset of the hub, or the embedded sample.

Text streams through here in pieces, so that memory does not grow with the corpus.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.engine.errors import UserError, did_you_mean

SAMPLES = Path(__file__).parent.parent / "samples"
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
PIECE_CHARACTERS = 256 * 1024


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
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"{setting}: {path} holds no {', '.join(SUFFIXES)} file")
        return files
    if not path.exists():
        raise UserError(f"{setting}: {path} does not exist")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{setting}: {path} is not a {', '.join(SUFFIXES)} file")
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
            yield Piece(row, starts=True, ends=True)


def running_text(stretches: Iterable[str]) -> Iterator[Piece]:
    """Yield one document in pieces of about 256 Ki characters, cut at ends of lines.

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


def from_hub(name: str, config: str | None, split: str, text_column: str, **load: Any) -> Iterator[str]:
    """Yield the rows of a dataset of the hub; `load` is passed to `datasets.load_dataset`.

    Raises:
        UserError: the dataset, split or column does not exist, or the hub cannot be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split, **load)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data.name: {name} ({config}, {split}) cannot be loaded: {reason}") from None
    if text_column not in rows.column_names:
        raise UserError(
            f"data.text_column: {name} has no column '{text_column}'"
            + did_you_mean(text_column, rows.column_names)
        )
    return (str(row) for batch in rows.iter(batch_size=1000) for row in batch[text_column])


def _characters(file: Path) -> Iterator[str]:
    try:
        # newline="" keeps every byte of the text, so that bits per byte count them.
        with file.open(encoding="utf-8", newline="") as stream:
            while stretch := stream.read(64 * 1024):
                if "\x00" in stretch:
                    raise UserError(f"{file}: is not text: it holds a zero byte")
                yield stretch
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not UTF-8 text ({error.reason} near byte {error.start}); convert it, for "
            "example with iconv"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _jsonl_rows(file: Path, column: str) -> Iterator[str]:
    def lines() -> Iterator[str]:
        rest = ""
        for stretch in _characters(file):
            *whole, rest = (rest + stretch).split("\n")
            yield from whole
        yield rest

    for number, line in enumerate(lines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: is not JSON: {error.msg}") from None
        if not isinstance(row, dict) or column not in row:
            keys = row.keys() if isinstance(row, dict) else ()
            raise UserError(f"{file}:{number}: has no '{column}'" + did_you_mean(column, keys))
        yield _text(row[column], f"{file}:{number}", column)


def _csv_rows(file: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            if column not in (reader.fieldnames or ()):
                raise UserError(
                    f"{file}: has no column '{column}'"
                    + did_you_mean(column, reader.fieldnames or ())
                )
            for row in reader:
                yield _text(row[column], f"{file}:{reader.line_num}", column)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is not CSV in UTF-8: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _parquet_rows(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: is not a parquet file: {str(error).splitlines()[0]}") from None
    if column not in table.schema_arrow.names:
        raise UserError(
            f"{file}: has no column '{column}'" + did_you_mean(column, table.schema_arrow.names)
        )
    for batch in table.iter_batches(batch_size=1000, columns=[column]):
        for value in batch.column(0).to_pylist():
            yield _text(value, str(file), column)


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: '{column}' is not text but {type(value).__name__}")
    return value


_ROWS = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
