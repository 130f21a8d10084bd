"""Passages and questions: read in every shape, each question with its passage; or one line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from runfolder.errors import UserError
from train.engine import hub
from train.engine.once import staged_path
from train.engine.settings import EncoderSettings
from train.labs.rag import corpus, passages
from train.labs.rag.chunks import ChunkSettings
from train.labs.rag.corpus import StagedPassages
from train.labs.rag.passages import PassageDataSettings

SQUAD: list[dict[str, Any]] = [
    {"title": "Tide", "text": "The Moon pulls.", "question": "What pulls?", "key": 7},
    {"title": "Tide", "text": "It is high twice a day.", "question": "How often?", "key": 8},
    {"title": "Tide", "text": "The Moon pulls.", "question": "What does the Moon do?", "key": 7},
    {"title": "Salt", "text": "The Moon pulls.", "question": "Who pulls here?", "key": 9},
]
Stage = Callable[..., StagedPassages]


@pytest.fixture
def stage(tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("SLUICE_DATASETS", str(tmp_path / "datasets"))

    def run(
        length: int = 32, staged: StagedPassages | None = None, online: bool = False, **data: Any
    ) -> StagedPassages:
        return corpus.stage(
            EncoderSettings(preset="tiny"),
            PassageDataSettings(**data),
            ChunkSettings(length=length, overlap=4),
            staged=staged,
            sample=None,
            online=online,
        )

    return run


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def read(staged: StagedPassages) -> tuple[list[tuple[str, str, str]], list[tuple[str, int]]]:
    folder = staged_path(staged.passages)
    found = [(p.id, p.title, p.text) for p in passages.read_passages(folder)]
    return found, [(q.text, q.passage) for q in passages.read_questions(folder)]


DISTINCT = [
    ("0", "Tide", "The Moon pulls."),
    ("1", "Tide", "It is high twice a day."),
    ("2", "Salt", "The Moon pulls."),
]
ASKED = [
    ("What pulls?", 0),
    ("How often?", 1),
    ("What does the Moon do?", 0),
    ("Who pulls here?", 2),
]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_of_questions_with_their_passage_are_both(
    stage: Stage, tmp_path: Path, suffix: str
) -> None:
    file = write(tmp_path / f"rows.{suffix}", SQUAD)
    assert read(stage(passages=file, questions=file)) == (DISTINCT, ASKED)


def test_a_folder_of_passages_is_read_whole_and_what_is_left_out_is_said(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    write(folder / "a.jsonl", SQUAD[:1])
    (folder / "b.JSON").write_text(json.dumps({"data": SQUAD[1:]}))
    (folder / "README.txt").write_text("About them.")
    found, _ = read(stage(passages=str(folder)))
    assert found == DISTINCT
    said = "data.passages: 2 files, 3 passages; left out: README.txt\n"
    assert said in capsys.readouterr().out


def test_the_rows_of_a_dataset_of_the_hub_are_both(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(*given: Any) -> Iterator[Any]:
        *_, split, columns = given
        assert split == "validation"
        for row in SQUAD:
            yield "data.name: a/b", tuple(row[column] for column in columns.values())

    monkeypatch.setattr(hub, "dataset_rows", rows)
    with pytest.raises(UserError, match=r"data.name: a/b \(validation\) is not staged"):
        stage(name="a/b")
    staged = stage(name="a/b", online=True)
    assert read(staged) == (DISTINCT, ASKED)
    assert stage(name="a/b") == staged, "it needs no network the second time"
    documents = stage(name="a/b", question_column=None, title_column=None, online=True)
    assert read(documents) == (
        [("0", "", "The Moon pulls."), ("1", "", "It is high twice a day.")],
        [],
    )


def test_questions_can_name_their_passage_by_its_id(stage: Stage, tmp_path: Path) -> None:
    file = write(tmp_path / "passages.jsonl", SQUAD)
    asked = write(tmp_path / "questions.csv", [{"question": "Which?", "answered_by": 9}])
    names = {"id_column": "key", "passage_column": "answered_by"}
    found, questions = read(stage(passages=file, questions=asked, **names))
    assert [id_ for id_, _, _ in found] == ["7", "8", "9"]
    assert questions == [("Which?", 2)]


def test_chunks_are_cut_again_for_another_length_and_a_run_keeps_its_rows(
    stage: Stage, tmp_path: Path
) -> None:
    text = " ".join(f"Sentence {n} is about the sea." for n in range(30))
    file = write(tmp_path / "rows.jsonl", [{"title": "Sea", "text": text}])
    first = stage(passages=file)
    chunks = corpus.read_chunks(staged_path(first.chunks))
    assert corpus.count_chunks(staged_path(first.chunks)) == len(chunks) > 5
    assert max(chunk.tokens for chunk in chunks) <= 32
    write(tmp_path / "rows.jsonl", [{"title": "Sea", "text": "Changed."}])
    again = stage(passages=file, staged=first, length=64)
    assert again.passages == first.passages, "a run goes on with the text that it began with"
    assert again.chunks != first.chunks
    assert stage(passages=file).passages != first.passages


PASSAGE = {"title": "Tide", "text": "The Moon pulls.", "id": "a"}
QUESTION = {"title": "Tide", "text": "The Moon pulls.", "question": "What?", "passage": "a"}
BY_ID = {"id_column": "id", "passage_column": "passage"}


@pytest.mark.parametrize(
    ("rows", "questions", "data", "line"),
    [
        ([], [], {}, r"data.passages: .*rows.jsonl: holds no passages"),
        ([PASSAGE | {"text": " "}], [], {}, r"rows.jsonl:1: the passage has no text; leave"),
        ([PASSAGE, {"text": "a"}], [], {}, r"rows.jsonl:2: has no column 'title'; .*title_column"),
        ([PASSAGE | {"text": 5}], [], {}, r"rows.jsonl:1: 'text' is not text but int"),
        ([PASSAGE], [QUESTION | {"text": "?"}], {}, r"asked.jsonl:1: no passage has its title"),
        ([PASSAGE], [QUESTION | {"passage": "b"}], BY_ID, r"asked.jsonl:1: no passage has the id"),
        ([PASSAGE], [QUESTION | {"passage": None}], BY_ID, r"'passage' is not an id but None"),
        ([PASSAGE], [QUESTION | {"question": ""}], {}, r"asked.jsonl:1: the question is empty"),
        ([PASSAGE, PASSAGE | {"text": "b"}], [], {"id_column": "id"}, "id 'a' is already used"),
        ([PASSAGE], [], {"id_column": "nr"}, r"has no column 'nr'; choose .* --data.id_column"),
    ],
)
def test_a_row_that_is_wrong_is_named_with_its_line(
    stage: Stage,
    tmp_path: Path,
    rows: list[dict[str, Any]],
    questions: list[dict[str, Any]],
    data: dict[str, str],
    line: str,
) -> None:
    given = {"passages": write(tmp_path / "rows.jsonl", rows)}
    if questions:
        given["questions"] = write(tmp_path / "asked.jsonl", questions)
    with pytest.raises(UserError, match=line):
        stage(**given, **data)
    left = [file for file in (tmp_path / "datasets").rglob("*") if file.name != ".lock"]
    assert left == [tmp_path / "datasets/passages"]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"questions": "a"}, "data.questions: is given without data.passages"),
        ({"passages": "a", "questions": "a", "question_column": None}, "question_column: is null"),
        ({"passage_column": "a"}, "data.passage_column: refers to passages by id; give"),
        ({"title_column": "text"}, "data.text_column: 'text' is the column of data.title_column"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(data: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        PassageDataSettings(**data)


def test_a_chunk_longer_than_the_encoder_reads_is_refused(stage: Stage, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [PASSAGE])
    line = "chunks.length: 257 is more than the 256 tokens .* try --chunks.length 256"
    with pytest.raises(UserError, match=line):
        stage(passages=file, length=257)


def test_the_positions_of_a_roberta_begin_after_its_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"model_type": "bert", "max_position_embeddings": 514, "pad_token_id": 1}
    monkeypatch.setattr(corpus, "read_shape", lambda folder, kind: shape)
    assert corpus.max_positions(tmp_path) == 514
    shape["model_type"] = "xlm-roberta"
    assert corpus.max_positions(tmp_path) == 512
