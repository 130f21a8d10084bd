"""csvrows.py: what RFC 4180 allows is read as it is, all else refused by its line."""

from __future__ import annotations

import csv
import gzip
import io
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runfolder.errors import UserError
from train.engine import csvrows


def read(folder: Path, content: str | bytes, delimiter: str = ",") -> list[list[str]]:
    file = folder / "a.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [fields for _, fields in csvrows.read(file, delimiter)]


def refusal(folder: Path, content: str | bytes) -> str:
    """Return what is said of a file that is refused, without its folder."""
    with pytest.raises(UserError) as raised:
        read(folder, content)
    return str(raised.value).replace(f"{folder}/", "")


fields = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"))


@given(st.lists(st.tuples(fields, fields)), st.sampled_from([",", "\t"]), st.sampled_from([0, 1]))
def test_what_the_csv_module_writes_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    delimiter: str,
    quoting: int,
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=quoting).writerows([("a", "b"), *rows])
    found = read(tmp_path_factory.getbasetemp(), text.getvalue(), delimiter)
    assert found == [["a", "b"], *map(list, rows)]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('a,b\n1,"two\nlines, and ""quotes"""\n', [["1", 'two\nlines, and "quotes"']]),
        ("a,b\r\n1,x\r\n\r\n2,y", [["1", "x"], ["2", "y"]]),
        ("a,b\r1,x\r2,y\r", [["1", "x"], ["2", "y"]]),
        ("a,b\n1,C:\\new\n", [["1", "C:\\new"]]),
        ('a,b\n1,"C:\\"\n', [["1", "C:\\"]]),
        ('a,b\n"",\n', [["", ""]]),
        ("a\nx\n\ny\n", [["x"], ["y"]]),
    ],
)
def test_what_is_legal_stays(tmp_path: Path, content: str, rows: list[list[str]]) -> None:
    assert read(tmp_path, content)[1:] == rows


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a,b\n1,x\n2,one, two\n", 3),
        ("a,b\n1,x\n2\n", 3),
        ("a,b\n1,x,\n", 2),
        ("a\nwell, well\n", 2),
        # The quote of line 3 takes all up to the next one, or to the end.
        ('a,b\n1,"x"\n2,"open\n3,"y"\n', 3),
        ('a,b\n1,"x"\n2,"open\n3,y\n4,z\n', 3),
        ('"a","b"\n"1","open\n"2","y"\n', 2),
        ('a,b\n1,"open\n2,",y\n', 2),
        # Within a field.
        ('a,b\n1,"x" and more\n', 2),
        ('a,b\n1,he said "x"\n', 2),
        ('a,b\n1, "x"\n', 2),
        ('a,b\n"1",a "b"\n', 2),
        ('a,b\n1,x "y, z"\n', 2),
        # Backslashes.
        ('a,b\n1,"he said \\"x\\" to me"\n', 2),
        ('a,b\n1,"\\"x\\""\n', 2),
        ('a,b\n1,"x \\", y"\n', 2),
        ("a,b\n1,x\\, y\n", 2),
        ('a,b\n1,"x \\""\n2,"y \\""\n', 2),
    ],
)
def test_what_would_lose_or_cut_a_text_is_refused_by_the_line_where_its_row_begins(
    tmp_path: Path, content: str, line: int
) -> None:
    assert refusal(tmp_path, content).startswith(f"a.csv:{line}: ")


def test_a_quote_that_takes_the_rest_of_a_large_file_is_refused_before_it_is_all_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csvrows, "LONGEST_FIELD", 1000)
    assert refusal(tmp_path, 'a,b\n1,"open\n' + "2,x\n" * 1000).startswith("a.csv:2: ")


@pytest.mark.parametrize("name", ["a.csv", "b c.csv.gz"])
def test_the_command_for_backslashes_works_as_printed(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    content = b'a,b\n1,"he said \\"x\\" to me"\n'
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    with pytest.raises(UserError) as raised:
        list(csvrows.read(file, ","))
    command = str(raised.value).partition("before quotes: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    found = [fields for _, fields in csvrows.read(file, ",")]
    assert found == [["a", "b"], ["1", 'he said "x" to me']]


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"a,b\n1,x\n2,caf\xe9\n", 3), ("a,b\n1,x\n".encode("utf-16"), 1), (b"a,b\n1,x\0\n", 2)],
)
def test_what_is_not_utf8_text_is_refused_by_its_line(
    tmp_path: Path, content: bytes, line: int
) -> None:
    assert refusal(tmp_path, content).startswith(f"a.csv:{line}: is not ")
