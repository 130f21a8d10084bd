"""Passages and the questions that they answer: read from files or the hub, staged once.

Without torch, so that mistakes in them are reported at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from runfolder.errors import UserError
from train.engine import hub, texts
from train.engine.datafiles import DataFiles, find_rows
from train.engine.once import datasets_folder, fingerprint, make_once, named_by_content
from train.engine.rows import READ_FORMAT, Row, as_text, read_rows
from train.labs.rag.chunks import Chunk, titled

FORMAT = 1


@dataclass(kw_only=True)
class PassageDataSettings:
    """Passages to search, and questions to measure the search with."""

    PATHS = ("passages", "questions")

    name: str | None = None
    """A dataset's hub id (owner/name) whose rows have a passage, with or without a question."""
    config: str | None = None
    """The dataset's configuration."""
    revision: str | None = None
    """The commit of the dataset."""
    split: str = "validation"
    """The dataset's split."""
    passages: str | None = None
    """Local rows instead of `name`: a jsonl, json, csv, tsv, parquet or arrow file, or a folder.
    A passage that occurs twice counts once."""
    questions: str | None = None
    """Local rows of questions, to evaluate the search; it may be the same file."""
    title_column: str | None = "title"
    """The column of a passage's title; null: no titles."""
    text_column: str = "text"
    """The column of a passage's text."""
    id_column: str | None = None
    """The column of a passage's id; default: passages are numbered."""
    question_column: str | None = "question"
    """The column of the question; null: the hub dataset has no questions."""
    passage_column: str | None = None
    """The column of local questions with the id of the passage that answers; default: a question's
    row holds that passage's title and text."""

    def __post_init__(self) -> None:
        if self.questions and not self.passages:
            raise UserError("data.questions: is given without data.passages; give both")
        if self.questions and not self.question_column:
            raise UserError(
                "data.question_column: is null, but data.questions is given; give it too"
            )
        if self.passage_column and not (self.questions and self.id_column):
            raise UserError(
                "data.passage_column: refers to passages by id; give data.questions and "
                "data.id_column with it"
            )
        named: dict[str, str] = {}
        for setting in ("title_column", "text_column", "question_column", "passage_column"):
            column = getattr(self, setting)
            if column and column in named:
                raise UserError(
                    f"data.{setting}: '{column}' is the column of data.{named[column]} as well"
                )
            named |= {column: setting} if column else {}


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A passage: its id as the user knows it, its title and its text."""

    id: str
    title: str
    text: str

    def stretch(self, chunk: Chunk) -> str:
        """Return what the encoder reads of a chunk of this passage."""
        return titled(self.title[: chunk.title_end], self.text[chunk.start : chunk.end])


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, and the number of the passage that answers it."""

    text: str
    passage: int


def read_passages(folder: Path) -> list[Passage]:
    """Return the staged passages; a passage's number is its place in the list."""
    columns = {name: name for name in ("id", "title", "text")}
    rows = read_rows(folder / "rows.jsonl", columns)
    return [Passage(id=id_, title=title, text=text) for _, (id_, title, text) in rows]


def read_questions(folder: Path) -> list[Question]:
    """Return the staged questions; empty if none were given."""
    rows = read_rows(folder / "questions.jsonl", {"text": "text", "passage": "passage"})
    return [Question(text=text, passage=passage) for _, (text, passage) in rows]


# ---- rows -----------------------------------------------------------------------------------


class _Writer:
    """Writes distinct passages and numbers them in the order of their first row."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._numbers: dict[str, int] = {}
        self._contents: dict[str, str] = {}

    def add(self, where: str, own_id: str | None, title: str, text: str) -> int:
        if not text.strip():
            raise UserError(f"{where}: the passage has no text; leave the row out")
        content = _content(title, text)
        identity = content if own_id is None else own_id
        if identity in self._numbers:
            if self._contents[identity] != content:
                raise UserError(f"{where}: id '{identity}' is already used by another passage")
            return self._numbers[identity]
        number = len(self._numbers)
        row = {"id": str(number) if own_id is None else own_id, "title": title, "text": text}
        self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._numbers[identity], self._contents[identity] = number, content
        return number

    def by_content(self) -> dict[str, int]:
        return {self._contents[identity]: number for identity, number in self._numbers.items()}

    def by_id(self) -> dict[str, int]:
        return self._numbers


def _content(title: str, text: str) -> str:
    return hashlib.sha256(f"{title}\0{text}".encode()).hexdigest()


def stage_rows(data: PassageDataSettings, sample: Path | None, online: bool) -> Path:
    """Return the folder of rows.jsonl (passages) and questions.jsonl."""
    if data.passages is None and sample is None:
        if not data.name:
            raise UserError("data.name: is empty; give a dataset's hub id, or data.passages")
        columns = _columns(data, "title", "text", "id", "question")
        name = f"data.name: {data.name} ({data.split})"
        rows = hub.dataset_rows(data.name, data.config, data.revision, data.split, columns)
        return make_once(
            _place(data.name, data.config, data.revision, data.split, columns),
            lambda out: _write_together(rows, columns, out, name),
            name,
            online=online,
        )
    is_sample = data.passages is None
    if is_sample:
        assert sample is not None
        data = PassageDataSettings(
            passages=str(sample / "passages.jsonl"),
            questions=str(sample / "questions.jsonl"),
            id_column="id",
            passage_column="passage",
        )
        name = "the embedded sample"
    else:
        name = f"data.passages: {data.passages}"
    assert data.passages is not None
    given = find_rows(data.passages, "data.passages")
    questions = find_rows(data.questions, "data.questions") if data.questions else None
    files, asked = given.files, questions.files if questions else []
    columns = _columns(data, "title", "text", "id")
    wanted = ("question", "passage") if data.passage_column else ("question", "title", "text")
    question_columns = _columns(data, *wanted) if asked else {}
    read_from = (READ_FORMAT, fingerprint(files), fingerprint(asked))

    def write(folder: Path) -> None:
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
            writer = _Writer(stream)
            for file in files:
                for where, values in read_rows(file, columns):
                    row = _named(values, columns)
                    writer.add(
                        where, _id(row, where, columns), *_title_and_text(row, where, columns)
                    )
        if not writer.by_id():
            raise UserError(f"{name}: holds no passages")
        numbers = writer.by_id() if data.passage_column else writer.by_content()
        with (folder / "questions.jsonl").open("w", encoding="utf-8") as stream:
            for file in asked:
                for where, values in read_rows(file, question_columns):
                    row = _named(values, question_columns)
                    _write_question(row, where, question_columns, numbers, stream)

    folder = make_once(_place(*read_from, columns, question_columns), write, name)
    if not is_sample:
        _say_what_was_read(folder, given, questions)
    return folder


def _say_what_was_read(folder: Path, given: DataFiles, questions: DataFiles | None) -> None:
    for files, name, what in ((given, "rows", "passages"), (questions, "questions", "questions")):
        if files:
            with (folder / f"{name}.jsonl").open("rb") as stream:
                texts.say(files.describe(f"{sum(1 for _ in stream):,} {what}"))


def _write_together(rows: Iterator[Row], columns: dict[str, str], folder: Path, name: str) -> None:
    """Write passages and questions that are in the same rows, as in SQuAD."""
    with (
        (folder / "rows.jsonl").open("w", encoding="utf-8") as stream,
        (folder / "questions.jsonl").open("w", encoding="utf-8") as questions,
    ):
        writer = _Writer(stream)
        for where, values in rows:
            row = _named(values, columns)
            title, text = _title_and_text(row, where, columns)
            number = writer.add(where, _id(row, where, columns), title, text)
            if "question_column" in columns:
                known = {_content(title, text): number}
                _write_question(row, where, columns, known, questions)
    if not writer.by_id():
        raise UserError(f"{name}: holds no passages")


def _write_question(
    row: dict[str, Any],
    where: str,
    columns: dict[str, str],
    numbers: dict[str, int],
    stream: TextIO,
) -> None:
    text = as_text(row["question_column"], where, columns["question_column"])
    if not text.strip():
        raise UserError(f"{where}: the question is empty; leave the row out")
    if "passage_column" in columns:
        key = _id(row, where, columns, "passage_column")
        what = f"no passage has the id '{key}'"
    else:
        key = _content(*_title_and_text(row, where, columns))
        what = "no passage has its title and text"
    if key not in numbers:
        raise UserError(f"{where}: {what}; add the passage to data.passages, or leave the row out")
    line = {"text": text, "passage": numbers[key]}
    stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _columns(data: PassageDataSettings, *names: str) -> dict[str, str]:
    """Return the column settings that are given, with the column of each."""
    settings = [f"{name}_column" for name in names]
    return {setting: getattr(data, setting) for setting in settings if getattr(data, setting)}


def _named(values: tuple[Any, ...], columns: dict[str, str]) -> dict[str, Any]:
    return dict(zip(columns, values, strict=True))


def _title_and_text(row: dict[str, Any], where: str, columns: dict[str, str]) -> tuple[str, str]:
    title = as_text(row.get("title_column"), where, columns.get("title_column", ""))
    return title.strip(), as_text(row["text_column"], where, columns["text_column"])


def _id(
    row: dict[str, Any], where: str, columns: dict[str, str], setting: str = "id_column"
) -> str | None:
    if setting not in columns:
        return None
    value = row[setting]
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise UserError(f"{where}: '{columns[setting]}' is not an id but {value!r}")
    return str(value).strip()


def _place(*made_of: Any) -> Path:
    return named_by_content(datasets_folder() / "passages", FORMAT, *made_of)
