"""Phases: what trains when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runfolder.errors import UserError
from train.labs.imdb.unfreezing import Phase, UnfreezingSettings, plan


@given(st.integers(1, 10_000), st.sampled_from(["backbone", "none", "gradual"]))
def test_the_phases_follow_each_other_and_use_all_steps(max_steps: int, freeze: str) -> None:
    settings = UnfreezingSettings(phases="0:50 2:25 7:25")
    try:
        phases = plan(freeze, settings, max_steps=max_steps, num_blocks=7)  # type: ignore[arg-type]
    except UserError:
        assert freeze == "gradual" and max_steps < 4
        return
    assert all(phase.steps >= 1 for phase in phases)
    assert [phase.first_step for phase in phases] == [0, *(phase.end for phase in phases[:-1])]
    assert phases[-1].end == max_steps == sum(phase.steps for phase in phases)


def test_each_way_to_freeze_is_a_list_of_phases() -> None:
    settings = UnfreezingSettings(phases="0:50 2:20 4:30")

    def blocks(freeze: str) -> list[tuple[int, int]]:
        phases = plan(freeze, settings, max_steps=1000, num_blocks=7)  # type: ignore[arg-type]
        return [(phase.blocks, phase.steps) for phase in phases]

    assert blocks("backbone") == [(0, 1000)]
    assert blocks("none") == [(7, 1000)]
    assert blocks("gradual") == [(0, 500), (2, 200), (4, 300)]
    assert Phase(first_step=500, steps=200, blocks=2).end == 700


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("", "is not of the form"),
        ("0:50 two:50", "is not of the form"),
        ("0:50,2:50", "is not of the form"),
        ("1:50 2:50", "begin with 0, only the head"),
        ("0:50 2:20 2:30", "does not go deeper"),
        ("0:50 4:20 2:30", "does not go deeper"),
        ("0:50 2:20", "add up to 100"),
        ("0:100 2:0", "add up to 100"),
    ],
)
def test_a_wrong_list_of_phases_is_said(phases: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        UnfreezingSettings(phases=phases)


def test_wrong_rates_are_said() -> None:
    with pytest.raises(UserError, match="head_lr: -1"):
        UnfreezingSettings(head_lr=-1)
    with pytest.raises(UserError, match=r"block_decay: 1\.5"):
        UnfreezingSettings(block_decay=1.5)


def test_more_blocks_than_there_are_and_too_few_steps_are_said() -> None:
    with pytest.raises(UserError, match="4 blocks should train, but the encoder has only 3: 2"):
        plan("gradual", UnfreezingSettings(), max_steps=100, num_blocks=3)
    with pytest.raises(UserError, match="max_steps: 2 leaves no step for the phase 2:20"):
        plan("gradual", UnfreezingSettings(), max_steps=2, num_blocks=7)
