"""Lab 5 on two processes: every strategy learns from packed conversations what one process does.

Each run of two processes is stopped half-way and resumed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.conftest import read_metrics
from tests.ranks import STRATEGIES

# As for text.
TOLERANCE = 2e-5
SETTINGS = [
    *("--dry_run", "--max_steps", "4", "--log_every_steps", "1", "--sample.max_new_tokens", "4"),
    *("--evaluation.every_steps", "2", "--checkpoint.every_steps", "2", "--export", "false"),
    # At the dry run's rate, the first steps blow up the last bits.
    *("--schedule.warmup_steps", "0", "--optimizer.lr", "2e-3"),
]


@pytest.mark.computes(2)
def test_every_strategy_learns_what_one_process_does(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    def train(accel: str, num_processes: int) -> list[dict[str, Any]]:
        run = tmp_path / f"{accel}-{num_processes}"
        words = ["train.labs.chat.script", *SETTINGS, "--run_folder", str(run)]
        done = ranks.run(accel, num_processes, *words, environment=clean_environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "\nresuming from step-00000003" in done.stdout
        assert "Warning" not in done.stderr, done.stderr
        keys = ("step", "loss", "lr", "tokens", "validation_loss", "bits_per_byte")
        return [{key: line[key] for key in keys if key in line} for line in read_metrics(run)]

    expected = train("ddp", 1)
    assert [line["step"] for line in expected] == list(range(5))
    assert expected[4]["validation_loss"] < expected[0]["validation_loss"] - 0.02
    for accel in STRATEGIES:
        found = train(accel, 2)
        for line, expected_line in zip(found, expected, strict=True):
            assert line == pytest.approx(expected_line, abs=TOLERANCE), accel
