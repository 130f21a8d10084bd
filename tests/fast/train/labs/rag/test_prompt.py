"""The prompt: numbered, never above its budget."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runfolder.errors import UserError
from train.labs.rag.prompt import INSTRUCTION, Source, build

SOURCES = [
    Source(title="Tide", text="The sea rises. It falls again. So it goes."),
    Source(title="", text="The Moon pulls on the water."),
    Source(title="Salt", text="Salt is won from the sea. It keeps meat."),
]


def words(text: str) -> int:
    return len(text.split())


def test_the_best_passages_get_the_first_numbers() -> None:
    prompt = build("Why does the sea rise?", SOURCES, count=words, budget=500)
    assert prompt.text == (
        f"{INSTRUCTION}\n\n[1] Tide\nThe sea rises. It falls again. So it goes.\n\n"
        "[2]\nThe Moon pulls on the water.\n\n[3] Salt\nSalt is won from the sea. It keeps meat."
        "\n\nQuestion: Why does the sea rise?\nAnswer:"
    )
    assert (prompt.num_sources, prompt.tokens) == (3, words(prompt.text))


def test_the_first_that_does_not_fit_is_cut_at_a_sentence_and_the_rest_is_left_out() -> None:
    whole = build("Why?", SOURCES[:2], count=words, budget=500).tokens
    prompt = build("Why?", SOURCES, count=words, budget=whole + 9)
    assert prompt.text.endswith(
        "[3] Salt\nSalt is won from the sea. ...\n\nQuestion: Why?\nAnswer:"
    )
    assert build("Why?", SOURCES, count=words, budget=whole + 8).num_sources == 2


@settings(max_examples=100)
@given(
    texts=st.lists(st.text("ab. \n", max_size=60), min_size=1, max_size=5),
    budget=st.integers(1, 120),
)
def test_no_prompt_is_above_its_budget(texts: list[str], budget: int) -> None:
    sources = [Source(title="t", text=text) for text in texts]
    try:
        prompt = build("q", sources, count=words, budget=budget)
    except UserError:
        first = Source(title="t", text="")
        assert words(build("q", [first], count=words, budget=1000).text) + 1 > budget - 60
        return
    assert words(prompt.text) == prompt.tokens <= budget
    assert 1 <= prompt.num_sources <= len(texts)
    assert f"[{prompt.num_sources}] t" in prompt.text
    assert f"[{prompt.num_sources + 1}] t" not in prompt.text


def test_a_budget_that_holds_no_passage_is_refused() -> None:
    alone = words(build("Why?", [], count=words, budget=0).text)
    line = rf"--max_prompt_tokens: 40 tokens are too few .* the question alone takes {alone}"
    with pytest.raises(UserError, match=line):
        build("Why?", SOURCES, count=words, budget=40)
