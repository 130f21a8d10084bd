from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from runfolder.errors import UserError
from train.engine.rows import as_text, read_rows

COLUMNS = {"label_column": "label", "text_column": "text"}
ROWS = [("b", 'two\nlines, a comma and "quotes"'), ("a", "z\u00fcrich \U0001f600")]


def write_jsonl(file: Path) -> None:
    file.write_text(
        '{"text": "two\\nlines, a comma and \\"quotes\\"", "label": "b", "more": [1]}\n'
        "\n"
        '{"label": "a", "text": "z\u00fcrich \\ud83d\\ude00"}',
        encoding="utf-8-sig",
    )


def write_csv(file: Path) -> None:
    file.write_text(
        'label,text,more\r\nb,"two\nlines, a comma and ""quotes""",1\r\n'
        "a,z\u00fcrich \U0001f600,\r\n",
        encoding="utf-8-sig",
        newline="",
    )


def write_parquet(file: Path) -> None:
    labels, texts = zip(*ROWS, strict=True)
    table = pyarrow.table({"text": texts, "more": [1, 2], "label": labels})
    pyarrow.parquet.write_table(table, file)


@pytest.mark.parametrize(
    ("suffix", "write", "places"),
    [
        ("jsonl", write_jsonl, [":1", ":3"]),
        ("csv", write_csv, [":2", ":4"]),
        ("parquet", write_parquet, [": row 1", ": row 2"]),
    ],
)
def test_a_row_has_its_place_and_the_columns_in_the_order_asked_for(
    tmp_path: Path, suffix: str, write: Callable[[Path], None], places: list[str]
) -> None:
    file = tmp_path / f"rows.{suffix}"
    write(file)
    found = list(read_rows(file, COLUMNS))
    assert [values for _, values in found] == ROWS
    assert [where for where, _ in found] == [f"{file}{place}" for place in places]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"text": "x", "label": "a"}\n{"text": "x"}', r"r.jsonl:2: has no column 'la"),
        ("r.jsonl", b'{"text": "x",}', r"r.jsonl:1: is not JSON: .* \(column 14\)"),
        ("r.jsonl", b"[1, 2]", r'r.jsonl:1: is not an object such as {"label": "...", "text"'),
        ("r.jsonl", b'\n{"text": "\xff"}', r"r.jsonl:2: is not UTF-8 .* convert it"),
        ("r.jsonl", b"[" * 100_000, r"r.jsonl:1: cannot be parsed as JSON"),
        ("r.csv", b"", r"r.csv: is empty; its first line names the columns"),
        ("r.csv", b"text\nx\n", r"r.csv: has no column 'label'; choose from text with --data.lab"),
        ("r.parquet", b"PAR1 and no more", r"r.parquet: is damaged, or not a parquet file"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(tmp_path / name, COLUMNS))


def test_a_text_is_text_and_a_null_is_none() -> None:
    assert as_text("x", "f:1", "text") == "x"
    assert as_text(None, "f:1", "text") == ""
    with pytest.raises(UserError, match="f:1: 'text' is not text but float"):
        as_text(1.5, "f:1", "text")
    with pytest.raises(UserError, match="f:1: 'text' contains invalid Unicode"):
        as_text("\ud83d", "f:1", "text")


def read(folder: Path, name: str, content: str, *columns: str) -> list[tuple[object, ...]]:
    (folder / name).write_text(content)
    wanted = {f"{column}_column": column for column in columns}
    return [values for _, values in read_rows(folder / name, wanted)]


@pytest.mark.parametrize("header", ["label, text", " label ,text ", "label,\ttext"])
def test_spaces_around_the_names_of_a_header_are_not_part_of_them(
    tmp_path: Path, header: str
) -> None:
    found = read(tmp_path, "a.csv", f"{header}\n1, x\n", "text", "label")
    assert found == [(" x", "1")]


@pytest.mark.parametrize(
    ("name", "content", "step"),
    [
        ("a.csv", "3,It rained all day\n4,It did not\n", "such as text,label"),
        ("a.csv", "pos,It rained all day\n", "such as text,label"),
        ("a.csv", "text;label\nx;1\n", "save it with commas, or with tabs as .tsv"),
        ("a.csv", "text\tlabel\nx\t1\n", "rename it to .tsv"),
        ("a.csv", "Text,label\nx,1\n", "choose from Text, label with --data.text_column"),
        ("a.csv", "text,label,text\nx,1,y\n", "rename one"),
    ],
)
def test_a_header_that_is_none_or_another_is_refused_with_the_next_step(
    tmp_path: Path, name: str, content: str, step: str
) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path, name, content, "text", "label")
    assert str(raised.value).endswith(step)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_column_that_a_table_has_twice_is_refused_if_it_is_read(
    tmp_path: Path, suffix: str
) -> None:
    table = pyarrow.Table.from_arrays(
        [pyarrow.array([i]) for i in ("x", "y", "z")], names=["text", "text", "label"]
    )
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match="has 2 columns 'text'"):
        list(read_rows(file, {"text_column": "text"}))
    assert list(read_rows(file, {"label_column": "label"})) == [(f"{file}: row 1", ("z",))]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_class_has_the_name_that_datasets_keeps_for_its_number(
    tmp_path: Path, suffix: str
) -> None:
    datasets: Any = importlib.import_module("datasets")
    names = ["zeta", "beta", "alpha"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    rows = {"text": ["a", "b", "c"], "label": [2, 0, -1]}
    made = datasets.Dataset.from_dict(rows, features=features)
    if suffix == "parquet":
        file = tmp_path / "rows.parquet"
        made.to_parquet(file)
    else:
        made.save_to_disk(tmp_path)
        (file,) = tmp_path.glob("*.arrow")
    columns = {"text_column": "text", "label_column": "label"}
    found = [values for _, values in read_rows(file, columns)]
    # -1 stands for no class.
    assert found == [("a", "alpha"), ("b", "zeta"), ("c", -1)]
