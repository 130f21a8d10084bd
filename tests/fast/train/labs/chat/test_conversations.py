"""Rows of the forms that chat data has, as turns; and what is no conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from runfolder.errors import UserError
from train.engine.rows import read_rows
from train.labs.chat.conversations import Conversation, Form
from train.labs.chat.settings import ConversationSettings


def read(file: Path, column: str | None = None) -> tuple[list[Conversation], Form]:
    form = Form("data.train", ConversationSettings(column=column))
    return [form.conversation(*row) for row in read_rows(file, form.choose)], form


def lines(folder: Path, *rows: Any) -> Path:
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "Be brief."}
# A row, the turns that it stands for, and how many of them are never learned.
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, str]], int]] = {
    "messages": (
        {"messages": [SYSTEM, *turns("Hi", "Ho")], "id": 7},
        [SYSTEM, *turns("Hi", "Ho")],
        0,
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        turns("Hi", "Ho"),
        0,
    ),
    "ShareGPT with a system": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
        },
        [SYSTEM, *turns("Hi", "Ho")],
        0,
    ),
    "prompt and completion": ({"prompt": "Hi", "completion": "Ho"}, turns("Hi", "Ho"), 1),
    "prompt and completion as turns": (
        {"prompt": turns("a", "b", "c"), "completion": turns("a", "b", "c", "d")[3:]},
        turns("a", "b", "c", "d"),
        3,
    ),
    "instruction": ({"instruction": "Add.", "output": "3"}, turns("Add.", "3"), 1),
    "instruction with an input": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."},
        [SYSTEM, *turns("Add.\n\n1 2", "3")],
        2,
    ),
    "instruction with an empty input": (
        {"instruction": "Add 1.", "input": "", "output": "3"},
        turns("Add 1.", "3"),
        1,
    ),
}


@pytest.mark.parametrize(("row", "expected", "num_given"), FORMS.values(), ids=FORMS.keys())
def test_each_form_becomes_turns(
    row: dict[str, Any], expected: list[dict[str, str]], num_given: int, tmp_path: Path
) -> None:
    (found,), _ = read(lines(tmp_path, row))
    assert found.turns == expected
    assert found.num_given == num_given


def test_columns_that_are_not_read_are_said(tmp_path: Path) -> None:
    _, form = read(lines(tmp_path, {"id": 1, "messages": turns("a", "b"), "tools": []}))
    assert form.describe() == "columns messages; not read: id, tools"


def test_a_table_and_an_own_column(tmp_path: Path) -> None:
    # Arrow gives every turn every key: null where a row has none.
    chats = [[{**turn, "name": None} for turn in turns("a", "b")]]
    table = pyarrow.table({"messages": [[]], "dialogue": chats})
    pyarrow.parquet.write_table(table, tmp_path / "chats.parquet")
    (found,), form = read(tmp_path / "chats.parquet", "dialogue")
    assert found.turns == turns("a", "b")
    assert form.describe() == "columns dialogue; not read: messages"


def test_what_else_a_turn_has_reaches_the_template(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows = [*turns("a"), call, {"role": "tool", "content": "1"}, *turns("", "b")[1:]]
    (found,), form = read(lines(tmp_path, {"messages": rows}))
    assert found.turns[1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    assert (
        form.describe() == "columns messages; the turns' tool_calls are left to the chat template"
    )


def test_openai_parts_and_weights(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answers = turns("c", "d", "e", "f")
    rows = [{"role": "user", "content": parts}, {**answers[1], "weight": 0}, *answers[2:]]
    (found,), form = read(lines(tmp_path, {"messages": rows}))
    assert found.turns[0] == {"role": "user", "content": "ab"}
    assert found.learned("answers") == found.learned("last_answer") == [3]
    assert form.describe() == "columns messages"


WRONG: dict[str, tuple[Any, str]] = {
    "an unknown role": (
        {"messages": [*turns("a", "b"), {"role": "bot", "content": "c"}]},
        "chats.jsonl:1: turn 3: its role is 'bot'; it has to be one of system, user, assistant",
    ),
    "a role that is no text": (
        {"messages": [{"role": 3, "content": "c"}]},
        "turn 1: its role is 3; it",
    ),
    "an empty turn": ({"messages": turns("a", " ")}, ":1: turn 2: its content is empty; remove"),
    "a null": (
        {"messages": [{"role": "user", "content": None}, *turns("a", "b")]},
        "turn 1: its content is empty",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}]},
        "turn 1: has a part of type 'image'; only text is learned",
    ),
    "a weight": (
        {"messages": [*turns("a"), {"role": "assistant", "content": "b", "weight": 0.5}]},
        "turn 2: its weight is 0.5; it has to be 0 or 1",
    ),
    "a weight of 0 on all": (
        {"messages": [*turns("a"), {"role": "assistant", "content": "b", "weight": 0}]},
        ":1: has no turn of the assistant to learn",
    ),
    "a system turn in the middle": (
        {"messages": [*turns("a", "b"), SYSTEM]},
        ":1: turn 3 is the system's, which may only be the first",
    ),
    "no answer": ({"messages": turns("a")}, ":1: has no turn of the assistant to learn"),
    "no turns": ({"messages": []}, ":1: has no turn of the assistant to learn"),
    "no role": ({"messages": [{"content": "a"}]}, "turn 1: has no 'from', only content"),
    "no value": ({"conversations": [{"from": "gpt"}]}, "turn 1: has no 'value', only from"),
    "text instead of turns": (
        {"messages": "hi"},
        ":1: 'messages' is not a list of turns such as",
    ),
    "a number among the turns": ({"messages": [1]}, ":1: 'messages' is not a list of turns"),
    "an empty completion": (
        {"prompt": "a", "completion": ""},
        ":1: 'completion' is empty; remove the row, or fill it in",
    ),
    "a completion of turns to a text": (
        {"prompt": "a", "completion": turns("a", "b")[1:]},
        ":1: 'completion' is not text but list",
    ),
    "a completion that answers nothing": (
        {"prompt": turns("a", "b"), "completion": turns("c")},
        ":1: has no turn of the assistant to learn",
    ),
    "no known column": (
        {"text": "a", "label": 1},
        "data.train: has the columns text, label, but neither messages, conversations, prompt and",
    ),
    "half a surrogate": ({"messages": turns("\ud83d", "b")}, "contains invalid Unicode"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_conversation_is_refused_with_its_place(
    row: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        read(lines(tmp_path, row))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"has no column 'chat'; choose from messages with --data.column"
    ):
        read(lines(tmp_path, {"messages": turns("a", "b")}), "chat")
