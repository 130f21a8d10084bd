from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.engine import staging
from train.engine.classification import labelled
from train.engine.classification.labelled import (
    Labelled,
    LabelledDataSettings,
    StagedLabelled,
    split_validation,
)
from train.engine.errors import UserError
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
    assert staging.staged_path(second.tokenizer).is_dir()


def test_names_stand_for_numbers() -> None:
    numbers = ["1", "2", "3"]
    assert labelled.named(numbers, None) == numbers
    assert labelled.named(numbers, ("x", "y", "z")) == ["x", "y", "z"]
    # Rows that have the names already, in whichever order.
    assert labelled.named(["x", "y", "z"], ("z", "x", "y")) == ["x", "y", "z"]
    with pytest.raises(UserError, match=r"are 2 for 3 classes \(1, 2, 3\)"):
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
