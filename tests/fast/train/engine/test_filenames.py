"""filenames.py: what a name says of a file, in capitals, compressed, wrapped."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.engine import filenames


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("a.jsonl.br", "decompress it first"),
        ("a.parquet.gz", "decompress it first"),
        ("a.jsonl.gz.gz", "decompress it first"),
        ("a.csv.zip", "unpack it and give the folder"),
        ("a.csv.TAR", "unpack it and give the folder"),
        ("a.jsonl.tar.gz", "unpack it and give the folder"),
        ("a.jsonl.part", "finish or delete it"),
        ("a.jsonl.gz.part", "finish or delete it"),
        ("a.jsonl.zip.crdownload", "finish or delete it"),
        ("a.csv.gpg", "decrypt it first"),
    ],
)
def test_data_in_a_wrapping_is_told_by_its_name_with_the_step_that_helps(
    name: str, step: str
) -> None:
    assert str(filenames.unread_form(Path(name))).endswith(step)


@pytest.mark.parametrize(
    "name", ["a.jsonl.orig", "data.tar.gz", "a.docx", "a.gz", "a.jsonl.docx.zip", "a.jsonl.gz"]
)
def test_what_is_no_data_by_its_name_or_is_read_is_in_no_such_form(name: str) -> None:
    assert filenames.unread_form(Path(name)) is None


@pytest.mark.parametrize(
    ("name", "step"),
    [("data.tar.gz", "unpack it"), ("b.part", "finish or delete"), ("a.gz", "use .txt, .jsonl")],
)
def test_a_file_that_was_named_is_refused_with_the_step_that_helps(name: str, step: str) -> None:
    assert step in filenames.refusal(Path(name))


@pytest.mark.parametrize(
    ("name", "train", "validation", "test"),
    [
        ("train-00000-of-00004.parquet", False, True, True),
        ("Test.jsonl", True, True, False),
        ("my_dev_set.csv", True, False, True),
        ("eval.json", True, False, False),
        ("test/train.txt", False, True, True),
        ("val/a.txt", True, False, True),
        ("latest/contest-trainer.txt", False, False, False),
    ],
)
def test_a_split_is_told_by_a_word_of_the_name_or_else_of_a_folder(
    name: str, train: bool, validation: bool, test: bool
) -> None:
    for split, is_other in (("train", train), ("validation", validation), ("test", test)):
        assert filenames.is_of_other_split(Path(name), split) is is_other
