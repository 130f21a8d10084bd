"""A run that is killed at random moments; at every moment that has a name: tests/real/train."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from runfolder.checkpoints import published
from tests.conftest import losses
from tests.ranks import Forked
from tests.real.train.test_faults import settings_for
from train.engine.checkpoint_reader import find_damage


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    """Return the seed of --seed, or a new one; a failure shows it."""
    given: int | None = pytestconfig.getoption("seed")
    chosen = random.SystemRandom().randrange(2**32) if given is None else given
    print(f'seed {chosen}: make drills ARGS="tests/drills/train/test_kills.py --seed {chosen}"')
    return chosen


def test_killed_at_20_random_moments_the_curve_equals_the_uninterrupted_one(
    seed: int, clean_environment: dict[str, str], tmp_path: Path
) -> None:
    max_steps = ("--max_steps", "400")
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    def start(run_folder: Path, *words: str) -> Forked:
        words = (*settings_for(run_folder, *max_steps), *words)
        return Forked("train.tinyllama", *words, environment=clean_environment)

    with start(straight, "--checkpoint.every_steps", "100") as process:
        done = process.end()
    assert done.returncode == 0, done.stderr
    moments = random.Random(seed)
    during_a_save = 0
    for number in range(20):
        asynchronous = "true" if number % 2 else "false"
        with start(killed, "--checkpoint.asynchronous", asynchronous) as process:
            # By then the first time, too, a checkpoint was published.
            process.wait_for("resuming from" if number else "step      3 ")
            time.sleep(moments.uniform(0.0, 0.6))
            # It may have come to its end.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
        during_a_save += any((killed / "checkpoints").glob(".step-*"))
        found = published(killed / "checkpoints")
        assert found, "a checkpoint was lost"
        assert [find_damage(folder) for folder in found] == [None] * len(found)
    print(f"{during_a_save} of 20 during a save")
    with start(killed) as process:
        done = process.end()
    assert done.returncode == 0, done.stderr
    assert losses(killed) == losses(straight)
    assert len(losses(killed)) == 400
