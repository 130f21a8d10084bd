"""datafiles.py: what a folder means is read to the last file, and the rest is named."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from runfolder.errors import UserError
from tests.data_folders import find, make, names
from train.engine import datafiles, overlap
from train.engine.data import pieces


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
    for name in ("x.parquet.gz", "x.jsonl.br", "x.csv.zip", "x.csv.tar", "x.txt.Z", "x.csv.part"):
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
    make(tmp_path, "a.txt", "a.txt.gz", "b/A.txt.gz", "c/a.txt", "c/A.txt")
    assert refusal(tmp_path).startswith(f"data.train: {tmp_path}/a.txt.gz is next to a.txt")
    (tmp_path / "a.txt.gz").unlink()
    assert len(find(tmp_path).files) == 4


@pytest.mark.parametrize("first", ["a.JSONL", "A.jsonl", "a.jsonl.zst", "a.jsonl.GZ"])
def test_nor_in_capitals_or_compressed_in_two_ways(tmp_path: Path, first: str) -> None:
    make(tmp_path, first, "a.jsonl.gz")
    assert "is next to" in refusal(tmp_path)


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
    # By every caller: labs 1 and 3 as well.
    assert refusal(tmp_path).startswith(f"data.train: {tmp_path}/closed cannot be read (Perm")


def test_what_holds_no_text_is_refused_by_its_setting(tmp_path: Path) -> None:
    make(tmp_path, "a.md")
    for path, said in (
        (tmp_path, "holds no .txt"),
        (tmp_path / "none.txt", "does not exist"),
        (tmp_path / "a.md", "has an unsupported suffix; use .txt, .jsonl"),
    ):
        assert refusal(path).startswith(f"data.train: {path} {said}")
    assert refusal(Path("~no-such-user/a.txt")).endswith("~no-such-user/a.txt does not exist")


def test_a_file_that_is_named_is_read_whatever_its_name(tmp_path: Path) -> None:
    make(tmp_path, "README.txt", ".hidden.txt")
    for name in ("README.txt", ".hidden.txt"):
        assert text_of(*find(tmp_path / name).files) == f"{name}\n"


# ---- folders of the datasets library ----


def save(folder: Path, *names: str) -> Path:
    """Write what save_to_disk writes about a dataset whose files these are."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_of_a_saved_dataset_its_own_files_are_read_and_not_what_was_made_of_them(
    tmp_path: Path,
) -> None:
    ours = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    stale = ["cache-0f3c.arrow", "data-00000-of-00001.arrow"]
    make(save(tmp_path / "train", *ours), *ours, *stale)
    found = find(tmp_path)
    assert names(found, tmp_path) == [f"train/{name}" for name in ours]
    assert [name.split(" ")[0] for name in found.left_out] == [
        *(f"train/{name}" for name in stale),
        "train/state.json",
    ]
    (tmp_path / "train" / ours[1]).unlink()
    assert refusal(tmp_path).startswith(f"data.train: {tmp_path}/train/{ours[1]} does not exist")


def test_a_cache_of_the_library_is_not_read_where_no_state_json_says_what_is(
    tmp_path: Path,
) -> None:
    make(tmp_path, "cache-0f3c.arrow", "wiki-train.arrow", "cache-1.jsonl")
    assert names(find(tmp_path), tmp_path) == ["cache-1.jsonl", "wiki-train.arrow"]


# ---- splits ----


def test_files_that_are_named_like_another_split_are_read_and_said(tmp_path: Path) -> None:
    ours = ["a.txt", "train/test.jsonl.gz", "train.jsonl", "validation.jsonl", "zoo/testimony.txt"]
    make(tmp_path, *ours)
    found = find(tmp_path)
    assert names(found, tmp_path) == ours
    assert found.of_other_splits() == ["train/test.jsonl.gz", "validation.jsonl"]
    assert "like another split: train/test.jsonl.gz, validation.jsonl (" in found.describe("")
    held_out = datafiles.find(str(tmp_path), "data.validation")
    assert held_out.of_other_splits() == ["train/test.jsonl.gz", "train.jsonl"]
    assert datafiles.find(str(tmp_path), "data.passages").of_other_splits() == []
    # What is named itself is meant.
    assert find(tmp_path / "validation.jsonl").of_other_splits() == []
    # What is apart is not read.
    training, _ = overlap.apart(
        found, datafiles.find(f"{tmp_path}/validation.jsonl", "data.validation")
    )
    assert training.of_other_splits() == ["train/test.jsonl.gz"]
