"""overlap.py: how much of a text is in another, whatever the order and the shape of either."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from train.engine import overlap
from train.engine.data import Piece, from_rows

ROWS = [f"Row number {n} says something that no other row says." for n in range(200)]
NAMES = [f"n{n:02}" for n in range(100)]


def rows(texts: list[str], *, join: bool = False) -> Callable[[], Iterator[Piece]]:
    return lambda: from_rows(texts, join_rows=join)


@pytest.mark.parametrize("join_train", [False, True])
@pytest.mark.parametrize("join_held_out", [False, True])
def test_the_share_is_that_of_the_rows_in_both(join_train: bool, join_held_out: bool) -> None:
    shuffled = random.Random(0).sample(ROWS[:150], 150)
    found = overlap.share(rows(shuffled, join=join_train), rows(ROWS[100:], join=join_held_out))
    assert found == pytest.approx(0.5, abs=0.005)


def test_nothing_shared_is_none_and_everything_is_all() -> None:
    assert overlap.share(rows(ROWS[:100]), rows(ROWS[100:])) == 0
    assert overlap.share(rows(ROWS), rows(ROWS[100:])) == 1
    assert overlap.share(rows(ROWS), rows([" "])) == 0


def test_short_lines_of_long_texts_do_not_count_but_short_rows_do() -> None:
    code = ["def f():\n    return None\n\nx = the_only_long_line_of_this_text()", "y = 1\n" * 9]
    other = ["def f():\n    return None\n\nx = another_long_line_of_another_text()"]
    assert overlap.share(rows(code), rows(other)) == 0
    assert overlap.share(rows(NAMES), rows(NAMES[:50] + [f"m{n}" for n in range(50, 100)])) == 0.5
    assert overlap.share(rows(NAMES), rows([*NAMES[:30], "x" * 30])) == pytest.approx(90 / 120)
    assert overlap.share(rows(NAMES, join=True), rows(NAMES[:50], join=True)) == 1


def test_of_a_large_text_a_fair_sample_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MAX_LINES", 500)
    many = [f"This is the line of number {n} of a great many." for n in range(10_000)]
    tracemalloc.start()
    found = overlap.share(rows(many[:7_500]), rows(many))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == pytest.approx(0.75, abs=0.07)
    assert held < 1_000_000
    assert overlap.share(rows(many[:7_500]), rows(many)) == found


def test_the_share_of_texts_counts_texts() -> None:
    assert overlap.share_of_texts(["a  b", "c"], ["a b", "d", "c", "c"]) == 0.75
    assert overlap.share_of_texts([], []) == 0
