"""Rows of files of every kind: the requested columns, one row at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from train.engine import csvrows, jsonrows
from train.engine.compression import unreadable
from train.engine.filenames import suffix_of

# Where a row is (file and line, if there are lines), and its values in the order asked for.
Row = tuple[str, tuple[Any, ...]]

# The setting that names a column, as it is below `data.`, and the column: {"text_column": "text"}.
# Or a function that chooses them from the names of the columns, of the first row in JSON.
Columns = Mapping[str, str] | Callable[[Sequence[str]], Mapping[str, str]]

# Increment when files give other rows, so that what was staged before is not used again.
READ_FORMAT = 3

_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")


def read_rows(file: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a file of `filenames.SUFFIXES` that has rows (all but .txt).

    A message about a column that is missing names its setting.

    Raises:
        UserError: a file does not match its suffix, or lacks a column; with its line.
    """
    yield from _READERS[suffix_of(file) or file.suffix](file, columns)


def as_text(value: Any, where: str, column: str) -> str:
    """Return a row's value; a null is a row without text.

    Raises:
        UserError: it is not text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        hint = "give a column of text"
        if isinstance(value, list | dict):
            hint = "convert it to text first, or for conversations use JOB=chat"
        raise UserError(f"{where}: '{column}' is not text but {kind}; {hint}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: '{column}' contains invalid Unicode (a lone surrogate)"
        ) from None
    return value


def class_name(names: Sequence[str] | None, value: Any) -> Any:
    """Return the name of a class by its number; other values, and -1 (no class), are unchanged."""
    is_class = names and isinstance(value, int) and 0 <= value < len(names)
    return names[value] if names and is_class else value


def chosen(columns: Columns, names: Iterable[str]) -> Mapping[str, str]:
    """Return the columns to read of those with `names`."""
    return columns([str(name) for name in names]) if callable(columns) else columns


def check_columns(where: str, columns: Mapping[str, str], found: Iterable[str]) -> None:
    """Raise `UserError` if a column is not among those `found`, or is there twice."""
    names = [str(name) for name in found]
    for setting, column in columns.items():
        if column not in names:
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            hint = f"; choose from {shown} with --data.{setting}" if names else ""
            raise UserError(f"{where}: has no column '{column}'{hint}")
        if names.count(column) > 1:
            raise UserError(f"{where}: has {names.count(column)} columns '{column}'; rename one")


def _csv_rows(file: Path, columns: Columns, delimiter: str = ",") -> Iterator[Row]:
    rows = csvrows.read(file, delimiter)
    _, header = next(rows, ("", []))
    if not header:
        raise UserError(f"{file}: is empty; its first line names the columns")
    # "label, text" means the columns label and text.
    names = [name.strip() for name in header]
    wanted = {setting: column.strip() for setting, column in chosen(columns, names).items()}
    if not set(wanted.values()) <= set(names):
        _check_header(file, names, list(wanted.values()))
    check_columns(str(file), wanted, names)
    places = [names.index(column) for column in wanted.values()]
    for where, fields in rows:
        yield where, tuple(fields[place] for place in places)


def _tsv_rows(file: Path, columns: Columns) -> Iterator[Row]:
    yield from _csv_rows(file, columns, "\t")


def _check_header(file: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise `UserError` if a first line without the columns is a row, or has other separators."""
    missing = f"{file}: has no column '{next(name for name in wanted if name not in names)}'"
    if len(names) == 1 and (mark := next((mark for mark in ";\t|," if mark in names[0]), None)):
        shown = "tabs" if mark == "\t" else f"'{mark}'"
        step = "rename it to .tsv" if mark == "\t" else "save it with commas, or with tabs as .tsv"
        raise UserError(f"{missing}: its columns are separated by {shown}; {step}")
    if any(_NUMBER.fullmatch(name) or len(name.split()) > 3 for name in names):
        raise UserError(
            f"{missing}: its first line looks like a row, not like the names of its {len(names)} "
            f"columns; put a line with the names on top, such as {','.join(wanted)}"
        )


def _json_lines(file: Path, columns: Columns) -> Iterator[Row]:
    yield from _picked(jsonrows.read_lines(file), columns)


def _json_rows(file: Path, columns: Columns) -> Iterator[Row]:
    # Without columns, an object is a row.
    wanted = () if callable(columns) else columns.values()
    yield from _picked(jsonrows.read_document(file, wanted), columns)


def _picked(rows: Iterable[tuple[str, Any]], columns: Columns) -> Iterator[Row]:
    for where, row in rows:
        if not isinstance(row, dict):
            names = ["text"] if callable(columns) else columns.values()
            shape = json.dumps(dict.fromkeys(names, "..."), ensure_ascii=False)
            wrapped = isinstance(row, list)
            hint = "; a list of rows is read from a file named .json" if wrapped else ""
            raise UserError(f"{where}: is not an object such as {shape}{hint}")
        columns = chosen(columns, row)
        check_columns(where, columns, row)
        yield where, tuple(row[column] for column in columns.values())


def _parquet_rows(file: Path, columns: Columns) -> Iterator[Row]:
    import pyarrow.parquet

    # Otherwise it reads a whole row group ahead, which can be the whole file.
    yield from _table_rows(
        file,
        columns,
        lambda: pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20),
        lambda table: table.schema_arrow,
        lambda table, names: table.iter_batches(batch_size=1000, columns=names),
    )


def _arrow_rows(file: Path, columns: Columns) -> Iterator[Row]:
    import pyarrow

    def open_either() -> Any:
        try:
            return pyarrow.ipc.open_stream(pyarrow.OSFile(str(file)))
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(pyarrow.OSFile(str(file)))

    def batches(table: Any, _names: list[str]) -> Iterator[Any]:
        if hasattr(table, "num_record_batches"):
            return (table.get_batch(i) for i in range(table.num_record_batches))
        return iter(table)

    yield from _table_rows(file, columns, open_either, lambda table: table.schema, batches)


def _table_rows(
    file: Path,
    columns: Columns,
    open_table: Callable[[], Any],
    schema_of: Callable[[Any], Any],
    batches_of: Callable[[Any, list[str]], Iterable[Any]],
) -> Iterator[Row]:
    import pyarrow

    try:
        table = open_table()
        schema = schema_of(table)
        columns = chosen(columns, schema.names)
        check_columns(str(file), columns, schema.names)
        classes = [_class_names(schema, column) for column in columns.values()]
        number = 0
        for batch in batches_of(table, list(columns.values())):
            for start in range(0, batch.num_rows, 1000):
                part = batch.slice(start, 1000)
                lists = (part.column(name).to_pylist() for name in columns.values())
                for values in zip(*lists, strict=True):
                    number += 1
                    yield (
                        f"{file}: row {number}",
                        tuple(map(class_name, classes, values)),
                    )
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow's errors about a file's content have no errno.
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(file, error) from None
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: is damaged, or not a {file.suffix[1:]} file: {reason}") from None


def _class_names(schema: Any, column: str) -> list[str]:
    """Return the class names that `datasets` stores for a column's numbers; mostly none."""
    try:
        kept = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = kept["info"]["features"][column]
        return list(feature["names"]) if feature["_type"] == "ClassLabel" else []
    except (KeyError, TypeError, ValueError):
        return []


_READERS: dict[str, Callable[[Path, Columns], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
