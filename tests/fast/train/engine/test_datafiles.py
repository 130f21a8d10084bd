"""datafiles.py: what a folder means is read to the last file, and the rest is named."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from train.engine import datafiles
from train.engine.data import pieces
from train.engine.datafiles import DataFiles
from train.engine.errors import UserError


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


def make(folder: Path, *names: str) -> Path:
    """Make files, each with its own name as its content."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    return folder


def find(path: Path) -> DataFiles:
    return datafiles.find(str(path), "data.train")


def names(found: DataFiles, folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in found.files]


def text_of(*files: Path) -> str:
    return "".join(piece.text for piece in pieces(files, text_column="text", join_rows=True))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        find(path)
    return str(raised.value)


# ---- a folder ----


def test_a_folder_means_its_data_files_in_order_and_names_the_others(tmp_path: Path) -> None:
    ours = ["a/z.jsonl", "b.TXT", "c.Json", "d.txt.GZ", "f.csv", "g.tsv", "h.ndjson", "i.parquet"]
    others = ["J.md", "README.txt", "a/dataset_info.json", "license.txt", "train.zip", "x.csv.orig"]
    hidden = [".e.txt", ".git/", "__pycache__/"]
    make(tmp_path, *ours, *others, ".e.txt", ".git/d.txt", "__pycache__/e.txt", ".git/f/g.txt")
    found = find(tmp_path)
    assert names(found, tmp_path) == ours
    assert sorted(found.left_out) == sorted([*others, *hidden])


def test_the_line_about_a_folder_counts_its_files_and_names_three_at_most(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", ".hidden")
    assert find(tmp_path).describe("7 rows") == "data.train: 1 file, 7 rows; left out: .hidden"
    make(tmp_path, "b.txt", "1.pdf", "2.pdf", "3.pdf")
    assert (
        find(tmp_path)
        .describe("7 rows")
        .endswith("2 files, 7 rows; left out: 1.pdf, 2.pdf, 3.pdf and 1 more")
    )


def test_links_are_followed_each_file_once_and_loops_end(tmp_path: Path) -> None:
    folder, elsewhere = (
        make(tmp_path / "folder", "a.txt"),
        make(tmp_path / "else", "b.txt", "c/d.txt"),
    )
    (folder / "linked").symlink_to(elsewhere)
    (folder / "link.txt").symlink_to(tmp_path / "folder/a.txt")
    (folder / "loop").symlink_to(folder)
    (elsewhere / "c/up").symlink_to(tmp_path)
    found = find(folder)
    assert sorted(text_of(*found.files).split()) == ["a.txt", "b.txt", "c/d.txt"]
    assert "link.txt (the same file as a.txt)" in found.left_out


@pytest.mark.parametrize("target", ["nowhere.txt", "a.txt"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, target: str) -> None:
    make(tmp_path, "b.txt")
    (tmp_path / "a.txt").symlink_to(tmp_path / target)
    assert f"{tmp_path}/a.txt" in refusal(tmp_path)


def test_data_in_a_form_that_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("x.parquet.gz", "x.jsonl.br", "x.csv.zip", "x.txt.Z"):
        folder = make(tmp_path / name[-4:], "a.txt", name)
        assert f"{folder}/{name}" in refusal(folder)


def test_what_is_empty_is_named_and_what_stands_for_data_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, "a.txt", "c.jsonl")
    (folder / "b.txt.gz").touch()
    found = find(folder)
    assert (names(found, folder), found.left_out) == (["a.txt", "c.jsonl"], ["b.txt.gz (empty)"])
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (folder / "c.jsonl").write_text(pointer)
    for given in (folder, folder / "c.jsonl"):
        assert "git lfs pull" in refusal(given)


def test_a_file_beside_its_compressed_self_is_not_read_twice(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "a.txt.gz")
    assert refusal(tmp_path).startswith(f"data.train: {tmp_path}/a.txt.gz lies beside a.txt")


def test_a_folder_within_that_is_closed_is_not_left_out_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a.txt", "closed/b.txt")
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        find(tmp_path)


def test_what_holds_no_text_is_refused_by_its_setting(tmp_path: Path) -> None:
    make(tmp_path, "a.md")
    for path, said in (
        (tmp_path, "holds no .txt"),
        (tmp_path / "none.txt", "does not exist"),
        (tmp_path / "a.md", "is of no kind that is read; convert it to .txt, .jsonl"),
    ):
        assert refusal(path).startswith(f"data.train: {path} {said}")


def test_a_file_that_is_named_is_read_whatever_its_name(tmp_path: Path) -> None:
    make(tmp_path, "README.txt", ".hidden.txt")
    for name in ("README.txt", ".hidden.txt"):
        assert text_of(*find(tmp_path / name).files) == f"{name}\n"


# ---- compressed ----


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_gives_its_text_and_one_that_is_cut_is_refused(
    tmp_path: Path, suffix: str
) -> None:
    text = "".join(f"line {n} of some\n" for n in range(20_000))
    # Two members, as `cat` and parallel compressors make them.
    data = b"".join(COMPRESS[suffix](part.encode()) for part in (text[:5000], text[5000:]))
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(data)
    assert text_of(*find(tmp_path).files) == text
    for wrong in (data[:-20], data[:1000], b"no such file"):
        file.write_bytes(wrong)
        with pytest.raises(UserError, match=r"a\.txt\.\w+: is cut short or damaged"):
            text_of(file)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.xz", "a.json.zst", "a.tsv.bz2"])
def test_rows_are_read_from_compressed_files(tmp_path: Path, name: str) -> None:
    rows = {"json": '[{"text": "x"}]', "jsonl": '{"text": "x"}', "csv": "text\nx\n"}
    content = rows.get(name.split(".")[1], "text\nx\n")
    (tmp_path / name).write_bytes(COMPRESS[Path(name).suffix](content.encode()))
    assert text_of(tmp_path / name) == "x\n"


# ---- two settings ----


def test_a_file_of_the_held_out_data_is_left_out_of_the_training_folder(tmp_path: Path) -> None:
    folder = make(tmp_path, "a.txt", "b.txt", "held/c.txt", "held/d.txt")
    # A copy by another name is the same text.
    (folder / "copy.txt").write_text((folder / "held/c.txt").read_text())
    for given, left in (
        ("b.txt", ["a.txt", "copy.txt", "held/c.txt", "held/d.txt"]),
        ("held", ["a.txt", "b.txt"]),
        ("copy.txt", ["a.txt", "b.txt", "held/d.txt"]),
    ):
        held_out = datafiles.find(str(folder / given), "data.validation")
        training, same = datafiles.apart(find(folder), held_out)
        assert names(training, folder) == left
        assert same == held_out
        assert len(training.left_out) == len(find(folder).files) - len(left)


def test_a_held_out_folder_around_the_training_file_loses_it(tmp_path: Path) -> None:
    folder = make(tmp_path, "a.txt", "b.txt")
    held_out = datafiles.find(str(folder), "data.validation")
    training, rest = datafiles.apart(find(folder / "a.txt"), held_out)
    assert (names(training, folder), names(rest, folder)) == (["a.txt"], ["b.txt"])


def test_two_settings_that_mean_the_same_keep_it(tmp_path: Path) -> None:
    given = find(make(tmp_path, "a.txt", "b.txt"))
    assert datafiles.apart(given, given) == (given, given)
    separate = find(make(tmp_path / "c", "d.txt"))
    assert datafiles.apart(given, separate) == (given, separate)


def test_gzip_of_the_command_line_is_read(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    subprocess.run(["gzip", str(tmp_path / "a.txt")], check=True)
    assert text_of(*find(tmp_path).files) == "a.txt\n"
