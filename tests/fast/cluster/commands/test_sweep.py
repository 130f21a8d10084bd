"""sweep.py: the points of a grid, their names, and what is refused before anything is asked."""

from __future__ import annotations

import pytest

from cluster.commands import sweep
from runfolder.errors import UserError


def test_a_grid_is_the_product_of_its_values_the_last_fastest() -> None:
    found = sweep.points_of("optimizer.lr=1e-5,2e-5 --seed=1,2")
    assert [dict(point) for point in found] == [
        {"optimizer.lr": lr, "seed": seed} for lr in ("1e-5", "2e-5") for seed in ("1", "2")
    ]
    names = sweep.names_of(found, "study")
    assert names[0] == "study-lr1e-5-seed1"
    assert len(set(names)) == 4
    assert sweep.in_words(found[3]) == "optimizer.lr=2e-5 seed=2"


def test_values_may_have_spaces_and_anything_else_and_names_stay_names() -> None:
    found = sweep.points_of("'prompt=a b/c,\u00fc'")
    assert [dict(point) for point in found] == [{"prompt": "a b/c"}, {"prompt": "\u00fc"}]
    assert sweep.names_of(found, "s") == ["s-prompta_b_c", "s-prompt_"]


def test_names_that_are_long_or_would_be_alike_are_numbers() -> None:
    assert sweep.names_of(sweep.points_of("x=a/b,a_b"), "s") == ["s-1", "s-2"]
    assert sweep.names_of(sweep.points_of(f"x={'a' * 200}"), "s") == ["s-1"]


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("", "GRID= is missing"),
        ("seed", "GRID: 'seed' is not KEY=VALUE,VALUE"),
        ("=1", "GRID: '=1' is not KEY=VALUE,VALUE"),
        ("a b=1", "GRID: 'a' is not KEY=VALUE,VALUE"),
        ("seed=", "GRID: 'seed=' has an empty value"),
        ("seed=1,,2", "GRID: 'seed=1,,2' has an empty value"),
        ("seed=1,1", "GRID: 'seed=1,1' has an empty value, or one twice"),
        ("seed=1 seed=2", "GRID: 'seed=2' has an empty value, or one twice"),
        ("seed='1", "GRID=seed='1: No closing quotation"),
        (" ".join(f"k{i}=1,2,3,4,5,6,7,8,9,0" for i in range(4)), "GRID: has 10,000 points"),
    ],
)
def test_a_grid_that_is_none_is_refused(grid: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        sweep.points_of(grid)
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5"])
def test_at_most_is_a_number_of_runs(given: str) -> None:
    with pytest.raises(UserError, match=rf"^MAX={given}: must be a whole number, at least 1"):
        sweep.at_most(given, 4)


def test_at_most_is_all_of_them_if_nothing_is_said() -> None:
    assert (sweep.at_most("", 6), sweep.at_most("2", 6), sweep.at_most("9", 6)) == (6, 2, 6)
