"""Every strategy trains on two processes: as one process does, and after a stop to the last bit.

More of it, with accumulation and other numbers of processes, is in tests/real/train.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.conftest import read_metrics

# fp32 sums of 512 terms of size 6, taken in another order, differ by a few units in the last
# place (5e-7); a few optimizer steps do not amplify that beyond this.
TOLERANCE = 1e-5
SETTINGS = [
    *("--data.sequence_length", "32", "--data.train", "train/samples/train.txt"),
    *("--data.validation", "train/samples/validation.txt", "--evaluation.max_tokens", "128"),
    *("--batch.global_batch_size", "4", "--batch.micro_batch_size", "1"),
    *("--optimizer.lr", "3e-3", "--optimizer.max_grad_norm", "0.5", "--schedule.warmup_steps", "2"),
    *("--max_steps", "4", "--log_every_steps", "1", "--evaluation.every_steps", "4"),
    *("--checkpoint.every_steps", "100", "--export", "false"),
]
MODEL = ["--model.preset", "tiny"]


def train(
    run_folder: Path,
    model: list[str],
    accel: str,
    num_processes: int,
    environment: dict[str, str],
    *words: str,
) -> list[dict[str, Any]]:
    """Train, and return of each step what follows from the arithmetic."""
    words = (*model, *SETTINGS, "--run_folder", str(run_folder), *words)
    done = ranks.run(accel, num_processes, "train.tinyllama", *words, environment=environment)
    assert done.returncode == 0, done.stderr
    assert f"{accel}, {num_processes} x CPU, fp32: " in done.stdout
    # --dry_run stops half-way, as a cluster would; the step after it agrees on that.
    assert ("resuming from step-00000003, step 3" in done.stdout) == ("--dry_run" in words)
    keys = ("step", "loss", "lr", "grad_norm", "tokens", "validation_loss", "bits_per_byte")
    return [{key: line[key] for key in keys if key in line} for line in read_metrics(run_folder)]


@pytest.fixture(scope="module")
def one_process(
    tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> list[dict[str, Any]]:
    """Return the curve on one process without a wrapper."""
    curve = train(tmp_path_factory.mktemp("one"), MODEL, "ddp", 1, clean_environment)
    assert [line["step"] for line in curve] == list(range(5))
    assert curve[4]["loss"] < curve[1]["loss"] - 0.1
    assert all(line["grad_norm"] > 0.5 for line in curve[1:]), "clipping took no part"
    return curve


@pytest.fixture(scope="module")
def with_dropout(tied_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the settings of a model whose loss tells at once whether it trains or is asked."""
    folder = shutil.copytree(tied_model_folder, tmp_path_factory.mktemp("dropout") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    return [
        *("--model.preset", "null", "--model.name", str(folder)),
        *("--model.gradient_checkpointing", "true"),
    ]


@pytest.mark.computes(2)
@pytest.mark.parametrize("accel", ranks.STRATEGIES)
def test_two_processes_train_as_one_and_after_a_stop_to_the_last_bit(
    one_process: list[dict[str, Any]],
    with_dropout: list[str],
    clean_environment: dict[str, str],
    tmp_path: Path,
    accel: str,
) -> None:
    found = train(tmp_path / "two", MODEL, accel, 2, clean_environment)
    for line, expected_line in zip(found, one_process, strict=True):
        assert line == pytest.approx(expected_line, abs=TOLERANCE)
    # With dropout, and no evaluation between the stop at step 3 and step 4.
    straight = train(tmp_path / "straight", with_dropout, accel, 2, clean_environment)
    stopped = train(tmp_path / "stopped", with_dropout, accel, 2, clean_environment, "--dry_run")
    assert stopped == straight
