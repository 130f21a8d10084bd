"""Rows of jsonl, csv and parquet files: the columns that are asked for, one row at a time."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from train.engine.errors import UserError

# Where a row stands (file and line, where there are lines), and its values in the order asked for.
Row = tuple[str, tuple[Any, ...]]


def read_rows(file: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .csv or .parquet file.

    `columns` maps the setting that names a column, as it is below `data.`, to the column:
    {"text_column": "text"}. A message about a column that is missing names that setting.

    Raises:
        UserError: a file that is not what its name says, or lacks a column; with its line.
    """
    yield from _READERS[file.suffix](file, columns)


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


def check_columns(where: str, columns: Mapping[str, str], found: Iterable[str]) -> None:
    """Raise `UserError` if a column is not among those `found`, which it names."""
    names = [str(name) for name in found]
    for setting, column in columns.items():
        if column not in names:
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            hint = f"; choose from {shown} with --data.{setting}" if names else ""
            raise UserError(f"{where}: has no column '{column}'{hint}")


def not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    """Return the error for a file that is not UTF-8."""
    return UserError(
        f"{where}: is not UTF-8 text ({error.reason}); convert it, such as with iconv -t UTF-8"
    )


def _jsonl_rows(file: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    where = str(file)
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                where = f"{file}:{number}"
                if not line.strip():
                    continue
                row = json.loads(line.decode("utf-8-sig"))
                if not isinstance(row, dict):
                    shape = json.dumps(dict.fromkeys(columns.values(), "..."), ensure_ascii=False)
                    raise UserError(f"{where}: is not an object such as {shape}")
                check_columns(where, columns, row)
                yield where, tuple(row[column] for column in columns.values())
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON that can be read: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _csv_rows(file: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    where = str(file)
    try:
        # Spreadsheets begin a file with a mark (BOM) that is not part of the first column's name.
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if not reader.fieldnames:
                raise UserError(f"{file}: is empty; its first line names the columns")
            check_columns(str(file), columns, reader.fieldnames)
            for row in reader:
                where = f"{file}:{reader.line_num}"
                values = tuple(row[column] for column in columns.values())
                if None in values:
                    raise UserError(f"{where}: has fewer columns than the first line")
                yield where, values
    except UnicodeDecodeError as error:
        raise not_utf8(str(file), error) from None
    except csv.Error as error:
        raise UserError(f"{where}: is not CSV: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _parquet_rows(file: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Otherwise it reads a whole row group ahead, which can be the whole file.
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
        check_columns(str(file), columns, table.schema_arrow.names)
        names = list(columns.values())
        for batch in table.iter_batches(batch_size=1000, columns=names):
            lists = (batch.column(name).to_pylist() for name in names)
            for values in zip(*lists, strict=True):
                yield str(file), values
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: is damaged, or not a parquet file: {reason}") from None


_READERS = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
