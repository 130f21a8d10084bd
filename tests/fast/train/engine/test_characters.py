"""characters.py: what is not UTF-8 is refused with a command that works as it is printed."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest

from runfolder.errors import UserError
from train.engine import characters

TEXT = "label,text\n" + "0,un caf\u00e9 pour deux \u2013 \u201ctr\u00e8s bon\u201d, dit-on\n" * 50
ENCODINGS = ["cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as raised:
        list(characters.read(file))
    return str(raised.value)


@pytest.mark.parametrize("name", ["a.csv", "it's a file.csv", "a.csv.gz"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_command_that_is_printed_gives_the_text_back(
    tmp_path: Path, encoding: str, name: str
) -> None:
    file = tmp_path / name
    data = TEXT.encode(encoding)
    data = gzip.compress(data) if file.suffix == ".gz" else data
    file.write_bytes(data)
    command = refusal(file).partition("convert it: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    assert "".join(characters.read(file)) == TEXT
    # The guess may be wrong: the original is still there.
    assert Path(f"{file}.orig").read_bytes() == data


def test_a_few_wrong_bytes_in_utf8_are_not_taken_for_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(TEXT.encode() + b"a wr\xe9ng byte\n" + TEXT.encode())
    said = refusal(file)
    assert said.startswith(f"{file}:{TEXT.count(chr(10)) + 1}: ")
    # iconv drops them and says by its code that it did.
    subprocess.run(["bash", "-c", said.partition("bytes: ")[2]], check=False)
    assert "".join(characters.read(file)) == TEXT + "a wrng byte\n" + TEXT


def test_utf8_that_is_cut_in_a_character_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes((TEXT + "\u00e9").encode()[:-1])
    subprocess.run(["bash", "-c", refusal(file).partition("bytes: ")[2]], check=False)
    assert "".join(characters.read(file)) == TEXT


@pytest.mark.parametrize(
    "content",
    ["\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440\n".encode("cp1251"), b"\x81\x8d\n"],
)
def test_no_encoding_is_named_where_none_is_likely(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    assert "ENCODING" in refusal(file)


def test_a_compressed_file_without_its_suffix_is_named_so(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(gzip.compress(TEXT.encode()))
    name = refusal(file).rpartition(" ")[2]
    file.rename(tmp_path / name)
    assert "".join(characters.read(tmp_path / name)) == TEXT


def test_the_mark_of_an_editor_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffcafé\r\n\ufeff".encode())
    assert "".join(characters.read(file)) == "café\r\n\ufeff"
