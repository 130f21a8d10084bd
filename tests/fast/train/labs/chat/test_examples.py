"""Examples in rows: which tokens are kept, where they are, and what is counted."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runfolder.errors import UserError
from tests.fast.train.labs.chat.conftest import with_template
from train.engine import tokenization
from train.labs.chat import template
from train.labs.chat.conversations import Conversation, Form
from train.labs.chat.examples import Examples, Summary, write
from train.labs.chat.packing import rows_of
from train.labs.chat.settings import ConversationSettings

# "<s>?</s>!</s>": the question is one token, the answer two with its end.
BODY = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def conversation(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return Conversation("row", turns)


@pytest.fixture(scope="module")
def tokenizer_folder(characters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(characters, BODY, tmp_path_factory.mktemp("tokenizer"))


def examples(
    tokenizer_folder: Path,
    folder: Path,
    conversations: list[Conversation],
    sequence_length: int,
    **settings: Any,
) -> Examples:
    folder.mkdir(exist_ok=True)
    form = Form("data.train", ConversationSettings(**settings))
    write(
        iter(conversations),
        form,
        template.Template(tokenizer_folder),
        tokenization.load(tokenizer_folder, parse_special_tokens=True),
        ConversationSettings(**settings),
        sequence_length,
        folder,
        "data.train: here",
    )
    return Examples(folder)


def texts(tokenizer_folder: Path, found: Examples) -> list[list[tuple[str, str]]]:
    """Return for each row its examples: the inputs as text, and the labels, with . for none."""
    decode = tokenization.load(tokenizer_folder, parse_special_tokens=True).tokenizer.decode
    rows = []
    for row in range(found.num_all):
        inputs, labels, positions = (part[0] for part in found.rows([row]))
        starts = [*np.flatnonzero(positions == 0), len(positions)]
        row_texts = []
        for first, last in pairwise(starts):
            said = decode(inputs[first:last].tolist(), skip_special_tokens=False)
            learned = [
                decode([i], skip_special_tokens=False) if i >= 0 else "."
                for i in labels[first:last]
            ]
            row_texts.append((said, "".join(learned)))
        rows.append(row_texts)
    return rows


def test_examples_share_rows_and_only_answers_are_labels(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    found = examples(
        tokenizer_folder,
        tmp_path,
        [conversation("ab", "c"), conversation("d", "ef"), conversation("g", "h", "i", "j")],
        10,
    )
    # The longest first; of n tokens, the last is only a label. "!" is the padding's id.
    assert texts(tokenizer_folder, found) == [
        [("<s>gh</s>ij", ".h</s>.j</s>"), ("<s>abc", "..c</s>")],
        [("<s>def", ".ef</s>"), ("!!!!!!", "......")],
    ]
    summary = found.summary
    assert (summary.num_conversations, summary.num_answers) == (3, 4)
    assert (summary.num_tokens, summary.num_targets, summary.num_bytes) == (5 + 5 + 7, 9, 5)
    assert summary.end_ids == [tokenization.load(tokenizer_folder).eos_id]
    assert found.bytes_of(9) == 5
    assert found.positions_per_target == 20 / 9
    assert (
        "3 conversations, 4 answers, 9 of 17 tokens are learned; 2 blocks of 10 tokens, 70% full"
        in (summary.describe())
    )


def test_without_packing_a_row_is_one_example_without_positions(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    both = [conversation("a", "b"), conversation("c", "d")]
    found = examples(tokenizer_folder, tmp_path, both, 10, packing=False)
    inputs, labels = found.rows([1, 0, 7])
    assert inputs.shape == labels.shape == (3, 10)
    assert [int((row != -100).sum()) for row in labels] == [2, 2, 0]


def test_what_is_too_long_is_cut_and_counted(tokenizer_folder: Path, tmp_path: Path) -> None:
    # Seven tokens: <s> q a </s> q b </s>
    chat = conversation("q", "a", "q", "b")
    for too_long, length, expected, answers in (
        ("cut_end", 5, ("<s>qa</s>q", ".a</s>.b"), 2),
        ("cut_end", 4, ("<s>qa</s>", ".a</s>."), 1),
        # The start of a text stays.
        ("cut_front", 3, ("<s>qb", ".b</s>"), 1),
    ):
        folder = tmp_path / f"{too_long}-{length}"
        found = examples(tokenizer_folder, folder, [chat], length, too_long=too_long)
        assert texts(tokenizer_folder, found) == [[expected]]
        assert (found.summary.num_cut, found.summary.num_answers) == (1, answers)
        assert "1 cut to the length of a block" in found.summary.describe()


def test_what_is_left_out_is_counted(tokenizer_folder: Path, tmp_path: Path) -> None:
    both = [conversation("a", "b"), conversation("a much longer question", "b")]
    for folder, too_long in (("one", "leave_out"), ("two", "cut_end")):
        found = examples(tokenizer_folder, tmp_path / folder, both, 6, too_long=too_long)
        assert (found.summary.num_left_out, found.num_all) == (1, 1)
        assert "1 left out: too long, or no answer within a block" in found.summary.describe()
    with pytest.raises(UserError, match=r"^data.train: here: all 1 conversations are left out"):
        examples(tokenizer_folder, tmp_path / "three", both[1:], 6)


def test_what_a_reader_has_to_know_is_said(tokenizer_folder: Path, tmp_path: Path) -> None:
    found = examples(tokenizer_folder, tmp_path, [conversation("is </s> the end?", "b")], 30)
    assert found.summary.spelled == {"</s>": 1}
    assert "'</s>' is spelled in 1 turn, and becomes that token" in found.summary.describe()


def test_no_end_token_is_counted(characters: Path, tmp_path: Path) -> None:
    body = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"
    folder = with_template(characters, body, tmp_path / "tokenizer")
    found = examples(folder, tmp_path / "examples", [conversation("a", "b", "c", "d")], 30)
    assert (found.summary.num_unended, found.summary.end_ids) == (2, [])
    assert "after 2 answers the chat template writes no end token" in found.summary.describe()


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60), st.booleans())
def test_every_example_is_in_one_row_and_no_row_is_too_full(
    lengths: list[int], packing: bool
) -> None:
    order, firsts = rows_of(np.asarray(lengths), 16, packing=packing)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    rows = [order[a:b].tolist() for a, b in pairwise(firsts)]
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < size <= 16 for size in used)
    if packing:
        # No two rows would fit into one: so best fit leaves less than half of the places free.
        assert len(rows) < 2 or sum(used) > 8 * len(rows)
    else:
        assert rows == [[i] for i in range(len(lengths))]


def test_a_damaged_folder_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    examples(tokenizer_folder, tmp_path, [conversation("a", "b")], 6)
    (tmp_path / "learned.bin").write_bytes(b"\1")
    with pytest.raises(UserError, match="is cut short; delete it, and it will be rebuilt"):
        Examples(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "later": 1}))
    with pytest.raises(UserError, match="does not hold conversations"):
        Examples(tmp_path)
    assert Summary(**meta).num_rows == 1
