"""Labelled texts: read from files or the hub, staged once, split by class; without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runfolder.errors import UserError, did_you_mean
from train.engine import datafiles, hub, overlap, pooling, staging, texts, tokenization
from train.engine.classification import classnames
from train.engine.classification.datasettings import SPLITS, LabelledDataSettings
from train.engine.data import Piece
from train.engine.datafiles import DataFiles
from train.engine.once import (
    datasets_folder,
    fingerprint,
    make_once,
    named_by_content,
    relative_to_datasets,
    staged_path,
)
from train.engine.pretrained import ENCODER
from train.engine.rows import READ_FORMAT, Row, as_text, read_rows
from train.engine.settings import EncoderSettings

FORMAT = 3
# The size of the tokenizer that goes with random weights.
TINY_VOCABULARY = 1024


@dataclass(kw_only=True)
class StagedLabelled:
    """Where the inputs of a classification lab are, under $SLUICE_DATASETS."""

    model: str | None = None
    tokenizer: str = ""
    train: str = ""
    test: str = ""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The rows of a split."""

    texts: list[str]
    labels: list[int]
    """For each text the number of its class."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: list[int]) -> Labelled:
        """Return the rows of `indices`, in that order."""
        return Labelled(
            texts=[self.texts[i] for i in indices], labels=[self.labels[i] for i in indices]
        )


def stage(
    model: EncoderSettings,
    data: LabelledDataSettings,
    *,
    staged: StagedLabelled | None,
    sample: Path | None,
    online: bool,
) -> StagedLabelled:
    """Stage encoder, tokenizer and rows, unless they are there already; return the paths.

    `sample` is the folder of the embedded rows of a dry run (train.jsonl, test.jsonl), which
    replace a dataset of the hub. Paths in `staged` are used as they are if they exist.

    Raises:
        UserError: something does not exist or is wrong, a row with its line; or it would have to
            be downloaded and `online` is False.
    """
    if staged is None or not all(_is_there(name) for name in vars(staged).values() if name):
        staged = _stage(model, data, sample, online)
    read(staged)  # Raises if the splits do not fit together.
    return staged


def _is_there(name: str) -> bool:
    return staged_path(name).exists()


def _stage(
    model: EncoderSettings, data: LabelledDataSettings, sample: Path | None, online: bool
) -> StagedLabelled:
    files: dict[str, DataFiles | None] = dict.fromkeys(SPLITS)
    if data.train is not None and data.test is not None:
        files["train"], files["test"] = overlap.apart(
            datafiles.find_rows(data.train, "data.train"),
            datafiles.find_rows(data.test, "data.test"),
        )
    rows = {split: _stage_rows(data, split, files[split], sample, online) for split in SPLITS}
    place = relative_to_datasets
    if model.preset is None:
        folder = staging.stage_model(model.name, model.revision, ENCODER, online=online)
        pooling.check_plain(folder)
        tokenizer_folder = staging.place_tokenizer(folder, model.name)
    else:
        folder = None
        tokenizer_folder = train_tokenizer(rows["train"], "text", "the training rows")
    staged = StagedLabelled(
        model=place(folder) if folder else None,
        tokenizer=place(tokenizer_folder),
        train=place(rows["train"]),
        test=place(rows["test"]),
    )
    _say_what_was_read(staged, files)
    return staged


def _say_what_was_read(staged: StagedLabelled, files: dict[str, DataFiles | None]) -> None:
    classes, train, test = read(staged)
    for split, rows in (("train", train), ("test", test)):
        if found := files[split]:
            texts.say(found.describe(f"{len(rows):,} rows"))
    if files["train"]:
        texts.say(f"data.label_column: {len(classes)} classes: {classnames.listed(classes)}")
    share = overlap.share_of_texts(train.texts, test.texts)
    if line := overlap.warning(share, "data.test", "data.train", "texts are"):
        texts.say(line)


def train_tokenizer(rows: Path, column: str, name: str) -> Path:
    """Return a tokenizer trained on a column of the staged `rows`, for an encoder from scratch."""

    def pieces() -> Iterator[Piece]:
        for _, (text,) in read_rows(rows / "rows.jsonl", {column: column}):
            yield Piece(text, starts=True, ends=True)

    return make_once(
        named_by_content(datasets_folder() / "tokenizers", "trained", TINY_VOCABULARY, rows.name),
        lambda out: tokenization.train(pieces(), TINY_VOCABULARY, out, name),
        f"a tokenizer trained on {name}",
    )


def _stage_rows(
    data: LabelledDataSettings,
    split: str,
    files: DataFiles | None,
    sample: Path | None,
    online: bool,
) -> Path:
    columns = {"text_column": data.text_column, "label_column": data.label_column}
    if data.title_column is not None:
        columns["title_column"] = data.title_column
    rows: Iterator[Row]
    if files is None and sample is None:
        if not data.name:
            raise UserError(
                "data.name: is empty; give a dataset's hub id, or data.train and data.test"
            )
        name = f"data.name: {data.name} ({split})"
        made_of: list[Any] = [data.name, data.config, data.revision, split]
        rows = hub.dataset_rows(data.name, data.config, data.revision, split, columns)
    else:
        if files is None:
            assert sample is not None
            name, columns = f"the embedded sample ({split})", {"text": "text", "label": "label"}
            paths = [sample / f"{split}.jsonl"]
        else:
            name, paths = f"data.{split}: {getattr(data, split)}", files.files
        made_of = [READ_FORMAT, *fingerprint(paths)]
        rows = (row for file in paths for row in read_rows(file, columns))

    folder = named_by_content(datasets_folder() / "rows", FORMAT, made_of, list(columns.values()))
    is_local = files is not None or sample is not None
    return make_once(
        folder, lambda out: _write_rows(out, rows, columns, name), name, online=online or is_local
    )


def _write_rows(folder: Path, rows: Iterator[Row], columns: dict[str, str], name: str) -> None:
    text_column, label_column, *title_columns = columns.values()
    count = 0
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for where, (text, label, *titles) in rows:
            parts = [
                as_text(part, where, column).strip()
                for part, column in zip([*titles, text], [*title_columns, text_column], strict=True)
            ]
            if not parts[-1]:
                raise UserError(f"{where}: the text is empty; leave the row out")
            row = {"where": where, "text": " ".join(part for part in parts if part)}
            row["label"] = classnames.class_name(label, where, label_column)
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    if count == 0:
        raise UserError(f"{name}: has no rows; give one or more of each class")


def read(staged: StagedLabelled) -> tuple[list[str], Labelled, Labelled]:
    """Return the classes, in order, and the rows of train and test.

    Raises:
        UserError: the training rows have fewer than two classes, a class has too few rows to keep
            one for validation, or a test row is of none of the classes.
    """
    split_rows = {}
    for split in SPLITS:
        file = staged_path(getattr(staged, split)) / "rows.jsonl"
        columns = {name: name for name in ("where", "text", "label")}
        split_rows[split] = [values for _, values in read_rows(file, columns)]
    classes = classnames.of_rows(label for _, _, label in split_rows["train"])
    numbers = {name: number for number, name in enumerate(classes)}
    for where, _, label in split_rows["test"]:
        if label not in numbers:
            raise UserError(
                f"{where}: label '{label}' is not in data.train" + did_you_mean(label, classes)
            )
    train, test = (
        Labelled(
            texts=[text for _, text, _ in split_rows[split]],
            labels=[numbers[label] for _, _, label in split_rows[split]],
        )
        for split in SPLITS
    )
    return classes, train, test


def named(classes: list[str], names: Sequence[str] | None) -> list[str]:
    """Return `classes` with the names of `data.class_names`, if they are whole numbers.

    Raises:
        UserError: there are more or fewer classes than names, or names of other classes.
    """
    if names is None or set(names) == set(classes):
        return classes
    if len(names) != len(classes):
        raise UserError(
            f"data.class_names: {len(names)} names for {len(classes)} classes "
            f"({classnames.listed(classes)}); give one for each, in this order, or null"
        )
    if not all(name.isdecimal() for name in classes):
        raise UserError(
            "data.class_names: is for classes that are whole numbers; these are "
            + classnames.listed(classes)
        )
    return list(names)


def split_validation(rows: Labelled, fraction: float, seed: int) -> tuple[Labelled, Labelled]:
    """Return the rows to train on and those kept for validation, each class in proportion.

    A class keeps at least one row on each side. The same seed gives the same rows.
    """
    # Not scikit-learn's, which rejects a small split in which a class would have no row.
    import random

    kept: set[int] = set()
    for number in sorted(set(rows.labels)):
        members = [i for i, label in enumerate(rows.labels) if label == number]
        size = min(max(1, round(fraction * len(members))), len(members) - 1)
        kept |= set(random.Random(f"{seed}/{number}").sample(members, size))
    everything = range(len(rows))
    return rows.take([i for i in everything if i not in kept]), rows.take(sorted(kept))
