"""Where the conversations are, and which of them are held back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from train.engine import datafiles, hub, overlap, rows, texts
from train.engine.data import SAMPLES, Piece
from train.engine.datafiles import DataFiles
from train.engine.once import fingerprint
from train.engine.rows import Row
from train.labs.chat.conversations import Conversation, Form
from train.labs.chat.settings import Config

# Conversations of our own: what the dry run trains on.
SAMPLE = SAMPLES / "chat"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The conversations of a split."""

    form: Form
    parts: list[Callable[[], Iterator[Conversation]]]
    """A function to read each of its files, in order."""
    text: texts.Source
    """What is said in them, without the system's turns: for a tokenizer, and for what the splits
    have in common."""

    def read(self) -> Iterator[Conversation]:
        """Yield the conversations."""
        return chain.from_iterable(part() for part in self.parts)


def find(config: Config) -> dict[str, Source]:
    """Return the conversations of each split.

    Raises:
        UserError: as `datafiles.find_rows`.
    """
    data = config.data
    if data.train is not None and data.validation is not None:
        found = overlap.apart(
            datafiles.find_rows(data.train, "data.train"),
            datafiles.find_rows(data.validation, "data.validation"),
        )
        return {
            split: _of_files(config, split, files.files, files, None)
            for split, files in zip(texts.SPLITS, found, strict=True)
        }
    if data.train is None and config.dry_run:
        return {
            split: _of_files(config, split, [SAMPLE / f"{split}.jsonl"], None, None)
            for split in texts.SPLITS
        }
    every = data.hold_back_every
    if data.train is not None:
        files = datafiles.find_rows(data.train, "data.train")
        return {
            split: _of_files(config, split, files.files, files, every) for split in texts.SPLITS
        }
    return {split: _of_hub(config, split, every) for split in texts.SPLITS}


def _of_files(
    config: Config, split: str, paths: list[Path], files: DataFiles | None, every: int | None
) -> Source:
    return _source(
        config,
        split,
        every,
        name=texts.name_of(config, split) if every is None else f"data.train: {config.data.train}",
        made_of=[rows.READ_FORMAT, fingerprint(paths)],
        readers=[partial(rows.read_rows, path) for path in paths],
        files=files,
    )


def _of_hub(config: Config, split: str, every: int) -> Source:
    data = config.data
    assert data.name is not None
    return _source(
        config,
        split,
        every,
        name=f"data.name: {data.name}",
        made_of=[data.name, data.config, data.revision],
        readers=[partial(hub.dataset_rows, data.name, data.config, data.revision, "train")],
        files=None,
        is_local=False,
    )


def _source(
    config: Config,
    split: str,
    every: int | None,
    *,
    name: str,
    made_of: list[Any],
    readers: list[Callable[[rows.Columns], Iterator[Row]]],
    files: DataFiles | None,
    is_local: bool = True,
) -> Source:
    form = Form(name, config.data)
    if every is not None and split == "validation":
        name = f"one row in {every} of {name}"
        files = replace(files, setting=f"one row in {every} of {files.setting}") if files else None

    def conversations(
        form: Form, read: Callable[[rows.Columns], Iterator[Row]]
    ) -> Iterator[Conversation]:
        for number, row in enumerate(read(form.choose)):
            # The last of every so many rows of a file.
            held_back = every is not None and number % every == every - 1
            if every is None or held_back == (split == "validation"):
                try:
                    conversation = form.conversation(*row)
                except UserError as error:
                    form.leave_out(error)
                else:
                    yield conversation

    def said(read: Callable[[rows.Columns], Iterator[Row]]) -> Iterator[Piece]:
        # With a form of its own, so that nothing is counted twice.
        for conversation in conversations(Form(name, config.data), read):
            for turn in conversation.turns:
                if turn["role"] != "system":
                    yield Piece(turn["content"] + "\n", starts=True, ends=True)

    return Source(
        form=form,
        parts=[partial(conversations, form, read) for read in readers],
        text=texts.Source(
            name=name,
            made_of=[
                *made_of,
                config.data.column,
                config.data.bad_rows,
                split if every else None,
                every,
            ],
            parts=[partial(said, read) for read in readers],
            files=files,
            is_local=is_local,
        ),
    )
