from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runfolder.errors import UserError
from train.engine.classification import labelled
from train.engine.classification.datasettings import LabelledDataSettings
from train.engine.classification.labelled import (
    Labelled,
    StagedLabelled,
    split_validation,
)
from train.engine.once import staged_path
from train.engine.settings import EncoderSettings

TINY = EncoderSettings(preset="tiny")


def write(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> dict[str, str]:
    for split, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}


def stage(data: LabelledDataSettings, staged: StagedLabelled | None = None) -> StagedLabelled:
    return labelled.stage(TINY, data, staged=staged, sample=None, online=False)


def rows(*labels: object, title: str | None = None) -> list[dict[str, Any]]:
    return [
        {"text": f" text {n}", "label": label, "title": title} for n, label in enumerate(labels)
    ]


def test_classes_that_are_numbers_are_in_their_order(environment: None, tmp_path: Path) -> None:
    files = write(tmp_path, rows(10, 2, 1, 10, "2", 1), rows(2, 10))
    classes, train, test = labelled.read(stage(LabelledDataSettings(**files)))
    assert classes == ["1", "2", "10"]
    assert train.labels == [2, 1, 0, 2, 1, 0]
    assert test.labels == [1, 2]
    assert train.texts == [f"text {n}" for n in range(6)]


@pytest.mark.parametrize(
    ("train", "test", "classes"),
    [
        ([0, 1, "0", "1"], [0.0, "1.0", 1, "0"], ["0", "1"]),
        ([1.0, 2.0, 1, 2], ["1", "2."], ["1", "2"]),
        ([True, False] * 2, ["True", "FALSE", "false", True], ["true", "false"]),
        ([-2, -3, "-2.0", -3.0], [-2], ["-2", "-3"]),
        ([-0.0, 1, "0", 1], ["-0.0"], ["0", "1"]),
        (["+1", "-0", 1, "0"], ["+1.0", "-0"], ["0", "1"]),
        ([".0", "1.0e+00", 1, "0"], ["0.", "+1"], ["0", "1"]),
        (["007", "1e5", "1E5x", "none"] * 2, ["007"], ["007", "1e5", "1E5x", "none"]),
    ],
)
def test_a_class_is_the_same_however_a_file_writes_it(
    environment: None, tmp_path: Path, train: list[Any], test: list[Any], classes: list[str]
) -> None:
    files = write(tmp_path, rows(*train), rows(*test))
    found, _, tested = labelled.read(stage(LabelledDataSettings(**files)))
    assert found == classes
    assert len(tested) == len(test)


def test_the_same_labels_in_a_table_and_in_csv_are_the_same_classes(
    environment: None, tmp_path: Path
) -> None:
    labels = [0.0, 1.0, 0.0, 1.0]
    table = pyarrow.table({"text": list("abcd"), "label": pyarrow.array(labels, "float32")})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    (tmp_path / "test.csv").write_text("text,label\ne,0\nf,1\n")
    files = {"train": str(tmp_path / "train.parquet"), "test": str(tmp_path / "test.csv")}
    classes, train, test = labelled.read(stage(LabelledDataSettings(**files)))
    assert (classes, train.labels, test.labels) == (["0", "1"], [0, 1, 0, 1], [0, 1])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["0.5", 1, 0, 1], r"train.jsonl:1: 'label' is 0.5, not a class"),
        ([0, 1, 0, 3.25], r"train.jsonl:4: 'label' is 3.25, not a class"),
        ([0, 1, 0, float("nan")], r"train.jsonl:4: 'label' is missing"),
        ([0, 1, 0, float("inf")], r"train.jsonl:4: 'label' is inf, not a class"),
        ([0, 1, 0, [1]], r"train.jsonl:4: 'label' is not a name or a number but \[1\]"),
        ([0, 1, -1.0, 1], r"train.jsonl:3: 'label' is -1, which means no class"),
        (["a", "b", "nan"], r"train.jsonl:3: 'label' is nan, which means a missing value"),
        (["a", "NA", "b"], r"train.jsonl:2: 'label' is NA, which means a missing value"),
        (["a", "b", "NULL"], r"train.jsonl:3: 'label' is NULL, which means"),
        (["a", "b", "-01"], r"train.jsonl:3: 'label' is -01, which means no class"),
        ([".5", "b", "a"], r"train.jsonl:1: 'label' is .5, not a class"),
        (["-02", "-2", "1"] * 2, "'-02' and '-2' differ only in how"),
        (["Sport", "sport", "art", "art"] * 2, "'Sport' and 'sport' differ only in how"),
        (["new  york", "new york", "art"] * 2, "'new york' and 'new  york' differ only in how"),
        (["caf\u00e9", "cafe\u0301", "art"] * 2, "differ only in how"),
        (["01", "1", "2"] * 2, "'01' and '1' differ only in how"),
    ],
)
def test_a_label_that_is_no_class_or_two_spellings_of_one_is_refused(
    environment: None, tmp_path: Path, labels: list[Any], said: str
) -> None:
    files = write(tmp_path, rows(*labels), rows(0))
    with pytest.raises(UserError, match=said):
        stage(LabelledDataSettings(**files))


def test_rows_classes_and_test_texts_that_are_trained_on_are_said(
    environment: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = [{"text": "text  1", "label": "b"}, {"text": "another", "label": "a"}]
    files = write(tmp_path, rows("a", "b") * 2, seen)
    stage(LabelledDataSettings(**files))
    said = capsys.readouterr().out
    assert "data.train: 1 file, 4 rows\n" in said
    assert "data.label_column: 2 classes: a, b\n" in said
    assert "warning: data.test: 50.0% of its texts are in data.train as well" in said


def test_test_rows_within_the_training_folder_are_not_trained_on(
    environment: None, tmp_path: Path
) -> None:
    files = write(tmp_path, rows("a", "b") * 2, [{"text": "another", "label": "a"}])
    data = LabelledDataSettings(train=str(tmp_path), test=files["test"])
    _, train, test = labelled.read(stage(data))
    assert (len(train), test.texts) == (4, ["another"])


def test_a_title_comes_before_the_text_where_there_is_one(
    environment: None, tmp_path: Path
) -> None:
    files = write(
        tmp_path, rows("a", "b", title="Rain ") + rows("a", "b"), rows("a", "b", title="Sun")
    )
    data = LabelledDataSettings(**files, title_column="title")
    _, train, test = labelled.read(stage(data))
    assert train.texts == ["Rain text 0", "Rain text 1", "text 0", "text 1"]
    assert test.texts == ["Sun text 0", "Sun text 1"]
    without = stage(LabelledDataSettings(**files))
    assert without.train != stage(data).train
    assert labelled.read(without)[1].texts[0] == "text 0"


def test_what_is_staged_is_kept_while_it_is_there_and_made_anew_when_the_file_changes(
    environment: None, tmp_path: Path
) -> None:
    files = write(tmp_path, rows("a", "b") * 2, rows("a"))
    data = LabelledDataSettings(**files)
    first = stage(data)
    write(tmp_path, rows("a", "b", "c") * 2, rows("a"))
    # A run goes on with the rows that it began with.
    assert stage(data, staged=first) == first
    second = stage(data)
    assert second.train != first.train
    assert labelled.read(second)[0] == ["a", "b", "c"]
    assert not Path(first.train).is_absolute()
    gone = StagedLabelled(**{**vars(first), "test": "rows/not-there"})
    assert stage(data, staged=gone) == second
    assert staged_path(second.tokenizer).is_dir()


def test_names_stand_for_numbers() -> None:
    numbers = ["1", "2", "3"]
    assert labelled.named(numbers, None) == numbers
    assert labelled.named(numbers, ("x", "y", "z")) == ["x", "y", "z"]
    # Rows that have the names already, in whichever order.
    assert labelled.named(["x", "y", "z"], ("z", "x", "y")) == ["x", "y", "z"]
    with pytest.raises(UserError, match=r"2 names for 3 classes \(1, 2, 3\)"):
        labelled.named(numbers, ("x", "y"))
    with pytest.raises(UserError, match=r"these are a, b"):
        labelled.named(["a", "b"], ("x", "y"))


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=80).filter(
        lambda labels: min(Counter(labels).values()) >= 2
    ),
    fraction=st.floats(0.01, 0.5),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_split_keeps_every_class_on_both_sides_and_loses_no_row(
    labels: list[int], fraction: float, seed: int
) -> None:
    whole = Labelled(texts=[f"text {n}" for n in range(len(labels))], labels=labels)
    train, validation = split_validation(whole, fraction, seed)
    assert sorted(train.texts + validation.texts) == sorted(whole.texts)
    for part in (train, validation):
        assert part.labels == [labels[int(text[5:])] for text in part.texts]
        assert set(part.labels) == set(labels)
    for label, count in Counter(labels).items():
        assert abs(validation.labels.count(label) - fraction * count) <= 1
    assert split_validation(whole, fraction, seed) == (train, validation)


def test_the_split_follows_from_the_seed() -> None:
    whole = Labelled(texts=[f"text {n}" for n in range(40)], labels=[0, 1] * 20)
    splits = [split_validation(whole, 0.25, seed)[1].texts for seed in (1, 2)]
    assert splits[0] != splits[1]
