"""schedule.py: warm-up, decay and the last step, as a pure function of the step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.engine.schedule import lr_at
from train.engine.settings import ScheduleSettings

KINDS = ("cosine", "linear", "constant")


def curve(
    kind: str, *, max_steps: int = 101, warmup_steps: int = 0, min_lr_ratio: float = 0.1
) -> list[float]:
    schedule = ScheduleSettings(
        kind=kind,  # type: ignore[arg-type]
        warmup_steps=warmup_steps,
        min_lr_ratio=min_lr_ratio,
    )
    steps = range(max_steps)
    return [lr_at(step, peak_lr=2.0, max_steps=max_steps, schedule=schedule) for step in steps]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_in_equal_parts_to_the_peak(kind: str) -> None:
    assert curve(kind, warmup_steps=4)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_the_last_step_has_the_smallest_part_of_the_peak() -> None:
    for kind in ("cosine", "linear"):
        assert curve(kind)[0] == 2.0
        assert math.isclose(curve(kind)[-1], 0.2)
    assert set(curve("constant")) == {2.0}


def test_half_way_cosine_and_linear_meet_and_cosine_is_above_before() -> None:
    cosine, linear = curve("cosine"), curve("linear")
    assert math.isclose(cosine[50], linear[50])
    assert math.isclose(linear[50], 1.1)
    assert math.isclose(cosine[25], 0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert cosine[25] > linear[25]


@given(st.sampled_from(KINDS), st.integers(1, 300), st.integers(0, 400), st.floats(0, 1))
def test_it_rises_then_falls_and_stays_between_nothing_and_the_peak(
    kind: str, max_steps: int, warmup_steps: int, min_lr_ratio: float
) -> None:
    found = curve(kind, max_steps=max_steps, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)
    assert all(0 <= lr <= 2.0 * (1 + 1e-9) for lr in found)
    warm, rest = found[:warmup_steps], found[warmup_steps:]
    assert warm == sorted(warm)
    assert all(later <= before + 1e-12 for before, later in pairwise(rest))
    assert all(lr > 0 for lr in warm)
    if min_lr_ratio > 0:
        assert all(lr >= 2.0 * min_lr_ratio * (1 - 1e-9) for lr in rest)


def test_a_step_past_the_end_keeps_the_last_rate() -> None:
    # A run that is continued with a smaller max_steps asks for such a step.
    schedule = ScheduleSettings()
    at = [lr_at(step, peak_lr=1.0, max_steps=10, schedule=schedule) for step in (9, 10, 1000)]
    assert at[0] == at[1] == at[2]
