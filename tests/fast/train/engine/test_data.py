"""data.py: text out of files, whole and in pieces, and what is wrong with a file by its line."""

from __future__ import annotations

import csv
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runfolder.errors import UserError
from train.engine import data
from train.engine.data import Piece, from_rows, pieces, running_text
from train.engine.filenames import SUFFIXES

ROWS = ["one\n", "", " zwei, drei\r\n", 'a "quoted" word', "   ", "語"]
texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"))


def write(path: Path, rows: list[str], column: str = "text", **options: Any) -> Path:
    """Write rows as the kind of file that the suffix says."""
    table = pa.table({"id": [1] * len(rows), column: rows})
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps({"id": 1, column: row}) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"id": 1, column: row} for row in rows]))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as stream:
            dialect = "excel" if path.suffix == ".csv" else "excel-tab"
            csv.writer(stream, dialect).writerows([["id", column], *([1, row] for row in rows)])
    elif path.suffix == ".arrow":
        # A stream, as save_to_disk of `datasets` writes it.
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    else:
        pq.write_table(table, path, **options)
    return path


def read(path: Path, *, text_column: str = "text", join_rows: bool = False) -> list[Piece]:
    return list(pieces([path], text_column=text_column, join_rows=join_rows))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        read(path)
    return str(raised.value)


def documents(found: Iterable[Piece]) -> list[str]:
    """Join pieces to documents; fails where one starts inside another, or does not end."""
    whole: list[str] = []
    inside = False
    for piece in found:
        assert piece.starts is not inside
        whole = [*whole, piece.text] if piece.starts else [*whole[:-1], whole[-1] + piece.text]
        inside = not piece.ends
    assert not inside
    return whole


# ---- pieces ----


@given(st.lists(texts), st.integers(1, 20))
def test_running_text_is_one_document_of_the_same_characters(
    stretches: list[str], piece_characters: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PIECE_CHARACTERS", piece_characters)
        found = list(running_text(stretches))
    assert documents(found) == ([text] if (text := "".join(stretches)) else [])
    assert all(len(piece.text) <= piece_characters for piece in found)


def test_pieces_are_cut_at_an_end_of_line_or_else_at_a_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data, "PIECE_CHARACTERS", 10)
    assert [piece.text for piece in running_text(["ab\ncd ef gh", "ijklmnopqrstuvw"])] == [
        "ab\n",
        "cd ef",
        " ghijklmno",
        "pqrstuvw",
    ]


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".txt"])
def test_rows_are_documents_of_their_own_or_lines_of_one(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}", ROWS)
    assert documents(read(path)) == [row for row in ROWS if row.strip()]
    # As WikiText has them: a line with its end, or nothing for an empty one.
    lines = "".join(row if row.endswith("\n") else row + "\n" for row in ROWS)
    assert documents(read(path, join_rows=True)) == [lines]


@given(st.lists(texts))
def test_joined_rows_have_each_one_line_end_at_least(rows: list[str]) -> None:
    [text] = documents(from_rows(rows, join_rows=True)) or [""]
    assert text == "".join(row if row.endswith("\n") else row + "\n" for row in rows)


@given(st.binary(max_size=200_000))
@settings(max_examples=50, deadline=None)
def test_a_text_file_gives_every_byte_or_the_line_that_is_not_text(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "a.txt"
    path.write_bytes(content)
    try:
        found = "".join(piece.text for piece in read(path))
    except UserError as error:
        line = int(str(error).split(":")[1])
        assert 1 <= line <= 1 + content.count(b"\n")
        assert b"\x00" in content or not _is_utf8(content)
    else:
        assert found.encode() == content


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("bad", [b"\xff", b"\xe8\xaa", b"\x00"])
@pytest.mark.parametrize("before", [0, 64 * 1024 - 1, 200_000])
def test_the_line_of_a_bad_byte_is_right_wherever_it_lies(
    tmp_path: Path, bad: bytes, before: int
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a line\n" * (before // 7) + b"x" * (before % 7) + bad)
    assert refusal(path).startswith(f"{path}:{before // 7 + 1}: is not ")


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".ndjson"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    row = "word " * 200
    before = peak = pa.total_allocated_bytes()
    path = tmp_path / f"large{suffix}"
    if suffix == ".txt":
        path.write_text((row + "\n") * 20_000)
    else:
        # One row group that is as large in the file as in memory.
        write(path, [row] * 20_000, compression="none", use_dictionary=False)
    characters = 0
    tracemalloc.start()
    try:
        for piece in pieces([path], text_column="text", join_rows=True):
            characters += len(piece.text)
            # What Arrow holds is not Python's.
            peak = max(peak, pa.total_allocated_bytes())
        taken = tracemalloc.get_traced_memory()[1] + peak - before
    finally:
        tracemalloc.stop()
    assert characters == 20_000 * len(row + "\n")
    assert taken < characters / 2


# ---- rows that are wrong ----


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON: Expecting property name"),
        ("3", 'is not an object such as {"text": "..."}'),
        ('{"txet": "a"}', "has no column 'text'; choose from txet with --data.text_column"),
        ('{"text": 3}', "'text' is not text but int"),
        ('{"text": "\\ud800"}', "'text' contains invalid Unicode"),
        ("[" * 100_000, "cannot be parsed as JSON"),
        ("9" * 5000, "cannot be parsed as JSON"),
    ],
)
def test_a_wrong_line_of_jsonl_is_named_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n')
    assert refusal(path).startswith(f"{path}:3: {said}")


def test_a_mark_at_the_start_as_spreadsheets_write_it_is_not_part_of_the_text(
    tmp_path: Path,
) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.csv").write_bytes(mark + b"text,id\nhello,1\n")
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "hello"}\n')
    for path in tmp_path.iterdir():
        assert documents(read(path)) == ["hello"]


def test_a_null_is_a_row_without_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": "a"}\n')
    pq.write_table(pa.table({"text": [None, "a"]}), tmp_path / "a.parquet")
    assert documents(read(path)) == documents(read(tmp_path / "a.parquet")) == ["a"]


def test_damaged_parquet_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.parquet", [f"row {i} " * 50 for i in range(2000)]).read_bytes()
    path = tmp_path / "a.parquet"
    for size in (0, 4, 11, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert refusal(path).startswith(f"{path}: is damaged, or not a parquet file: ")
    hole = len(whole) // 2
    path.write_bytes(whole[:hole] + bytes(len(whole) // 4) + whole[hole + len(whole) // 4 :])
    assert refusal(path).startswith(f"{path}: ")
    assert "has no column 'text'; choose from id, body with" in refusal(
        write(path, ["a"], column="body")
    )
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert refusal(path) == f"{path}: row 1: 'text' is not text but int; give a column of text"
