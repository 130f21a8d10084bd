"""The text of each split: which files or dataset it is, what was left out, and what is in both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from train.engine import datafiles, hub, overlap, rows
from train.engine.config import TextConfig, TrainingConfig
from train.engine.data import SAMPLES, Piece, from_rows, pieces
from train.engine.datafiles import DataFiles
from train.engine.once import datasets_folder, fingerprint, make_once, named_by_content
from train.engine.rows import as_text

SPLITS = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The text of a split: its name in messages, what it is made of, and how to read it."""

    name: str
    made_of: list[Any]
    """Cheap to compute, and different when the text is."""
    parts: list[Callable[[], Iterator[Piece]]]
    """A function to read each of its files, in order."""
    files: DataFiles | None = None
    """The files that the settings name; None for a dataset of the hub and the embedded sample."""
    is_local: bool = True

    def read(self) -> Iterator[Piece]:
        """Yield the text."""
        return chain.from_iterable(part() for part in self.parts)

    def describe(self, what: str) -> str:
        """Return the line that says what was read; `what` is the amount of it."""
        return self.files.describe(what) if self.files else f"{self.name}: {what}"


def name_of(config: TrainingConfig, split: str) -> str:
    """Return the name of a split's text in messages."""
    given = getattr(config.data, split)
    if given is not None:
        return f"data.{split}: {given}"
    if config.dry_run:
        return f"the embedded sample ({split})"
    return f"data.name: {config.data.name} ({split})"


def find(config: TextConfig) -> dict[str, Source]:
    """Return the text of each split; a file that is in both is kept in one of them.

    Raises:
        UserError: as `datafiles.find`.
    """
    data = config.data
    if data.train is not None and data.validation is not None:
        found = overlap.apart(
            datafiles.find(data.train, "data.train"),
            datafiles.find(data.validation, "data.validation"),
        )
        return {
            split: _local(config, split, files) for split, files in zip(SPLITS, found, strict=True)
        }
    return {
        split: _sample(config, split) if config.dry_run else _of_hub(config, split)
        for split in SPLITS
    }


def say_overlap(sources: dict[str, Source], *, online: bool) -> None:
    """Print how much of the validation text is trained on; computed once for each pair of texts.

    Of a large training text only the beginnings of its files are compared; that is printed too.
    """
    train, validation = (sources[split] for split in SPLITS)
    limit = overlap.MAX_CHARACTERS
    folder = named_by_content(
        datasets_folder() / "overlaps", overlap.FORMAT, limit, train.made_of, validation.made_of
    )
    if is_sample(train) or not (folder.is_dir() or online or train.is_local):
        return

    def compare(unfinished: Path) -> None:
        beginnings = overlap.Beginnings(train.parts, limit)
        share = overlap.share(lambda: beginnings, validation.read)
        found = {"share": share, "is_whole": beginnings.are_all}
        (unfinished / "share.json").write_text(json.dumps(found) + "\n", encoding="utf-8")

    make_once(folder, compare, f"a comparison of {validation.name} with the training text")
    found = json.loads((folder / "share.json").read_text(encoding="utf-8"))
    if not found["is_whole"]:
        say(
            f"data.validation: is compared with only {limit:,} characters of data.train, an equal "
            "part from the beginning of each of its files"
        )
    what = "text, line by line, is"
    if line := overlap.warning(found["share"], "data.validation", "data.train", what):
        say(line)


def is_sample(source: Source) -> bool:
    """Return whether a text is the embedded sample, which needs no report."""
    return source.is_local and source.files is None


def say(line: str) -> None:
    """Print a line about the data, from one process of a run."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _local(config: TextConfig, split: str, files: DataFiles) -> Source:
    return _of_files(config, split, files.files, files)


def _sample(config: TextConfig, split: str) -> Source:
    return _of_files(config, split, [SAMPLES / f"{split}.txt"], None)


def _of_files(config: TextConfig, split: str, paths: list[Path], files: DataFiles | None) -> Source:
    data = config.data
    return Source(
        name=name_of(config, split),
        made_of=[rows.READ_FORMAT, fingerprint(paths), data.text_column, data.join_rows],
        parts=[
            partial(pieces, [path], text_column=data.text_column, join_rows=data.join_rows)
            for path in paths
        ],
        files=files,
    )


def _of_hub(config: TextConfig, split: str) -> Source:
    data, column = config.data, config.data.text_column
    assert data.name is not None
    hub_id = data.name

    def read() -> Iterator[Piece]:
        found = hub.dataset_rows(hub_id, data.config, data.revision, split, {"text_column": column})
        texts = (as_text(text, where, column) for where, (text,) in found)
        yield from from_rows(texts, join_rows=data.join_rows)

    return Source(
        name=name_of(config, split),
        made_of=[hub_id, data.config, data.revision, split, column, data.join_rows],
        parts=[read],
        is_local=False,
    )
