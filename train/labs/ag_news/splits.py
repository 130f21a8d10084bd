"""The rows of a classification lab as it reads them: to train on, to validate on, to test on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from train.engine import encoders
from train.engine.classification import labelled
from train.engine.classification.datasettings import LabelledDataSettings
from train.engine.classification.labelled import StagedLabelled
from train.engine.once import staged_path


@dataclass(frozen=True, kw_only=True)
class Split:
    """Texts, their classes, and their tokens."""

    texts: list[str]
    labels: list[int]
    """For each text the number of its class."""
    ids: list[list[int]]
    """For each text its token ids, truncated to `max_length`."""

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The rows of a run, the same for all of its seeds."""

    classes: list[str]
    tokenizer_folder: Path
    max_length: int
    """Tokens of a text that are read."""
    training: Split
    validation: Split
    test: Split

    def describe(self) -> str:
        """Return how many rows and classes there are, as text."""
        names = ("training", "validation", "test")
        parts = [f"{len(getattr(self, name)):,} {name} rows" for name in names]
        return f"{len(self.classes)} classes, " + ", ".join(parts)


def read(
    staged: StagedLabelled, data: LabelledDataSettings, model: PreTrainedModel, seed: int
) -> Splits:
    """Return the rows that `staged` names, tokenized for `model`.

    The validation rows are drawn from the training rows, each class in proportion, by `seed`.
    """
    _, rows, test = labelled.read(staged)
    training, validation = labelled.split_validation(rows, data.validation_fraction, seed)
    max_length = encoders.max_length(model, data.max_length)
    tokenizer_folder: Path = staged_path(staged.tokenizer)

    def tokenized(split: labelled.Labelled) -> Split:
        ids = encoders.tokenize(tokenizer_folder, split.texts, max_length)
        return Split(texts=split.texts, labels=split.labels, ids=ids)

    return Splits(
        classes=[str(name) for name in (model.config.id2label or {}).values()],
        tokenizer_folder=tokenizer_folder,
        max_length=max_length,
        training=tokenized(training),
        validation=tokenized(validation),
        test=tokenized(test),
    )
