from __future__ import annotations

import pytest

from runfolder.errors import UserError
from train.labs.ag_news.epochs import EpochSettings


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, 30),  # three epochs of 100 rows in batches of 10
        ({"num_epochs": 1}, 10),
        ({"num_epochs": 1.01}, 11),
        ({"num_epochs": 1.01, "num_seeds": 3}, 33),
        ({"max_steps": 7}, 7),
        ({"max_steps": 8, "num_seeds": 2}, 8),
        ({"max_steps": 8, "num_epochs": 2, "dry_run": True}, 20),
    ],
)
def test_steps_are_counted(given: dict[str, float], steps: int) -> None:
    assert EpochSettings(**given).count_steps(100, 10) == steps  # type: ignore[arg-type]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match="max_steps: 7 do not divide among 2 seeds; try --max_s"):
        EpochSettings(max_steps=7, num_seeds=2).count_steps(100, 10)
    for given, message in (
        ({"num_epochs": 0}, "num_epochs: 0 is not a positive number"),
        ({"num_epochs": float("inf")}, "num_epochs: inf is not"),
        ({"num_epochs": 2, "max_steps": 5}, "leave one of them out"),
        ({"num_seeds": 0}, "num_seeds: 0 is not positive"),
        ({"max_steps": -1}, "max_steps: -1 is not positive"),
        ({"seed": -1}, "seed: -1 is not between"),
    ):
        with pytest.raises(UserError, match=message):
            EpochSettings(**given)  # type: ignore[arg-type]
