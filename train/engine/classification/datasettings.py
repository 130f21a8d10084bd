"""Settings of labelled texts: where they are, and the columns of text and class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

from runfolder.errors import UserError

SPLITS = ("train", "test")


@dataclass(kw_only=True)
class LabelledDataSettings:
    """Texts with their classes."""

    PATHS = SPLITS

    name: str | None = None
    """A dataset's hub id (owner/name); `make fetch` stages its splits train and test."""
    config: str | None = None
    """The dataset's configuration."""
    revision: str | None = None
    """The commit of the dataset."""
    train: str | None = None
    """Local rows instead of `name`: a jsonl, json, csv, tsv, parquet or arrow file, or a folder."""
    test: str | None = None
    """Local rows to test on, once, at the end; required with `train`."""
    text_column: str = "text"
    """The column that holds the text."""
    label_column: str = "label"
    """The column that holds the class: a name, a whole number, or true and false."""
    title_column: str | None = None
    """A column whose text is put before the text, if the rows have one."""
    class_names: tuple[str, ...] | None = None
    """Names for classes that are whole numbers, in the order of the numbers."""
    validation_fraction: float = 0.1
    """The fraction of the training rows of each class that is kept for validation."""
    max_length: int = 256
    """Tokens of a text that are read; the rest is truncated."""

    def __post_init__(self) -> None:
        if (self.train is None) != (self.test is None):
            given, missing = ("train", "test") if self.train else ("test", "train")
            raise UserError(
                f"data.{given}: is given without data.{missing}; give both, so that local rows are "
                "not mixed with a dataset of the hub"
            )
        columns = {"text_column": self.text_column, "label_column": self.label_column}
        if self.title_column is not None:
            columns["title_column"] = self.title_column
        for (first, name), (setting, other) in combinations(columns.items(), 2):
            if name == other:
                raise UserError(f"data.{setting}: '{other}' is data.{first} as well")
        if self.class_names is not None:
            if len(self.class_names) < 2:
                raise UserError(
                    f"data.class_names: has {len(self.class_names)} name; give two or more"
                )
            for name in self.class_names:
                if not name.strip() or self.class_names.count(name) > 1:
                    raise UserError(f"data.class_names: '{name}' is empty or appears twice")
        if not (
            math.isfinite(self.validation_fraction) and 0.01 <= self.validation_fraction <= 0.5
        ):
            raise UserError(
                f"data.validation_fraction: {self.validation_fraction} is not between 0.01 and 0.5"
            )
        if not 4 <= self.max_length <= 8192:
            raise UserError(f"data.max_length: {self.max_length} is not between 4 and 8192")
