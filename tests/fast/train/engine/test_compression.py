"""compression.py: the text of compressed files, and commands that rewrite them in place."""

from __future__ import annotations

import bz2
import gzip
import lzma
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from runfolder.errors import UserError
from train.engine import compression
from train.engine.compression import opened
from train.engine.data import pieces
from train.engine.filenames import SUFFIXES


def arrow_compress(codec: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return bytes(sink.getvalue())

    return compress


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": arrow_compress("zstd"),
    ".lz4": arrow_compress("lz4"),
}


def text_of(*files: Path) -> str:
    return "".join(piece.text for piece in pieces(files, text_column="text", join_rows=True))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_gives_its_text_and_one_that_is_cut_is_refused(
    tmp_path: Path, suffix: str
) -> None:
    text = "".join(f"line {n} of some\n" for n in range(20_000))
    # Two members, as `cat` and parallel compressors make them.
    data = b"".join(COMPRESS[suffix](part.encode()) for part in (text[:5000], text[5000:]))
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(data)
    assert text_of(file) == text
    for wrong in (data[:-20], data[:1000], b"no such file"):
        file.write_bytes(wrong)
        with pytest.raises(UserError, match=r"a\.txt\.\w+: is truncated or damaged"):
            text_of(file)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.xz", "a.json.zst", "a.tsv.bz2"])
def test_rows_are_read_from_compressed_files(tmp_path: Path, name: str) -> None:
    rows = {"json": '[{"text": "x"}]', "jsonl": '{"text": "x"}', "csv": "text\nx\n"}
    content = rows.get(name.split(".")[1], "text\nx\n")
    (tmp_path / name).write_bytes(COMPRESS[Path(name).suffix](content.encode()))
    assert text_of(tmp_path / name) == "x\n"


def test_gzip_of_the_command_line_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    subprocess.run(["gzip", str(tmp_path / "a.txt")], check=True)
    assert text_of(tmp_path / "a.txt.gz") == "text\n"


@pytest.mark.parametrize("inner", [".jsonl", ".json", ".csv", ".txt"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_rows_of_a_damaged_file_are_refused_by_its_name(
    tmp_path: Path, inner: str, suffix: str
) -> None:
    file = tmp_path / f"a{inner}{suffix}"
    file.write_bytes(b"no such file")
    with pytest.raises(UserError) as raised:
        text_of(file)
    assert str(raised.value).startswith(f"{file}: is truncated or damaged")


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".jsonl.gz", ".json.zst", ".csv.xz"])
def test_a_file_that_cannot_be_opened_is_refused_with_the_reason_of_the_system(
    tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"a{suffix}"
    with pytest.raises(UserError) as raised:
        text_of(file)
    assert str(raised.value) == f"{file}: cannot be read: No such file or directory"


@pytest.mark.parametrize("name", ["it's a.txt", "a.txt.gz", "a.txt.xz"])
def test_a_file_is_rewritten_in_place_and_no_original_is_lost(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(COMPRESS.get(file.suffix, bytes)(b"aab\n"))
    original = file.read_bytes()
    for _ in range(2):
        command = compression.rewrite_command(file, "sed s/a/b/")
        subprocess.run(["bash", "-c", command], check=True)
    with opened(file) as stream:
        assert stream.read() == b"bbb\n"
    assert Path(f"{file}.orig").read_bytes() == original
    assert Path(f"{file}.orig1").exists()
