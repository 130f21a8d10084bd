"""jsonrows.py: every shape in which rows are kept as JSON gives the same rows, one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runfolder.errors import UserError
from train.engine import jsonrows
from train.engine.rows import read_rows

ROWS: list[dict[str, Any]] = [{"text": "one\n[", "n": [1, {"a": "}"}]}, {"text": "zw\u00f6lf"}]
SHAPES = {
    "list": json.dumps(ROWS),
    "list over lines": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "lines": "\n".join(map(json.dumps, ROWS)),
    "objects over lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "list in an object": json.dumps({"version": "1", "more": [], "data": ROWS, "meta": {"a": 1}}),
    "with a mark": "\ufeff" + json.dumps(ROWS),
}


def read(folder: Path, content: str | bytes, suffix: str = "json") -> list[Any]:
    file = folder / f"a.{suffix}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [text for _, (text,) in read_rows(file, {"text_column": "text"})]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_rows(
    tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a value is cut wherever it can be.
    for size in (1, 7, 2**20):
        monkeypatch.setattr(jsonrows, "_READ", size)
        assert read(tmp_path, SHAPES[shape]) == [row["text"] for row in ROWS]


def test_an_object_with_the_columns_is_a_row_whatever_lists_it_has(tmp_path: Path) -> None:
    row = {"text": "a", "turns": [{"text": "b"}, {"text": "c"}]}
    assert read(tmp_path, json.dumps(row)) == ["a"]


@pytest.mark.parametrize("content", ["", " \n", "[]", "[ ]\n"])
def test_no_rows_are_none(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content) == []


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab"), inner),
    max_leaves=8,
)


@given(st.lists(values), st.integers(1, 30), st.sampled_from([None, 1]))
@settings(max_examples=40)
def test_a_list_is_read_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], size: int, indent: int | None
) -> None:
    file = tmp_path_factory.getbasetemp() / "a.json"
    file.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonrows, "_READ", size)
        assert [row for _, row in jsonrows.read_document(file, ["text"])] == rows


@pytest.mark.parametrize(
    ("suffix", "content", "place"),
    [
        ("json", '[{"text": "a"},\n {"text": }]', ":2: is not JSON"),
        ("json", '[{"text": "a"}\n {"text": "b"}]', ":2: is not JSON"),
        ("json", '[{"text": "a"},\n]', ":2: is not JSON"),
        ("json", '[{"text": "a"}', ":1: is not JSON"),
        ("json", '[{"text": "a"}] x', ":1: is not JSON"),
        ("json", '[{"text": "a"}, 5]', ": row 2: is not an object"),
        ("json", '[{"text": "a"}, {"txet": "b"}]', ": row 2: has no column 'text'"),
        ("json", '[{"text": "a"}, {"text": "b", "text": "c"}]', ": row 2: has 'text' twice"),
        ("json", '{"a": [{"text": "a"}], "b": [{"text": "b"}]}', ": row 1: has no column 'text'"),
        ("json", "[" * 100_000, ": row 1: cannot be parsed as JSON"),
        ("json", "[" + "9" * 5000, ": row 1: cannot be parsed as JSON"),
        ("json", b'[{"text": "caf\xe9"}]', ":1: is not UTF-8"),
        ("json", '[{"text": "a"}]'.encode("utf-16-le"), ":1: is not UTF-8"),
        ("jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}', ":2: has 'text' twice"),
        ("jsonl", '{"text": "a"}\n'.encode("utf-16-le"), ":1: is not UTF-8"),
        ("jsonl", '{"text": "a"}\n'.encode("utf-16"), ":1: is not UTF-8"),
        ("ndjson", '{"text": "a"}\n{"text"}\n', ":2: is not JSON"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(
    tmp_path: Path, suffix: str, content: str | bytes, place: str
) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path, content, suffix)
    assert str(raised.value).startswith(f"{tmp_path}/a.{suffix}{place}")


def test_an_object_too_large_to_be_held_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonrows, "LARGEST_VALUE", 1000)
    monkeypatch.setattr(jsonrows, "_READ", 100)
    rows = [{"text": "a" * 50}] * 1000
    assert len(read(tmp_path, json.dumps(rows))) == 1000
    with pytest.raises(UserError, match="one JSON value of over 1,000 characters"):
        read(tmp_path, json.dumps({"data": rows}))


def test_a_mistake_is_found_where_it_is_and_not_at_the_end_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonrows, "LARGEST_VALUE", 1000)
    monkeypatch.setattr(jsonrows, "_READ", 100)
    with pytest.raises(UserError, match=r"a\.json:1: is not JSON"):
        read(tmp_path, '[{"text": }, ' + json.dumps([{"text": "a" * 50}] * 1000))
