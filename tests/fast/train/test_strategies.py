"""Every strategy trains on two processes: as one process does, and after a stop to the last bit.

More of it, with accumulation and other numbers of processes, is in tests/real/train.
"""

from __future__ import annotations

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
# A model that trains in another way, such as with dropout, is one more line here.
MODELS = {"tiny": ["--model.preset", "tiny"]}


def train(
    run_folder: Path,
    model: str,
    accel: str,
    num_processes: int,
    environment: dict[str, str],
    *words: str,
) -> list[dict[str, Any]]:
    """Train, and return of each step what follows from the arithmetic."""
    words = (*MODELS[model], *SETTINGS, "--run_folder", str(run_folder), *words)
    done = ranks.run(accel, num_processes, "train.tinyllama", *words, environment=environment)
    assert done.returncode == 0, done.stderr
    assert f"{accel}, {num_processes} x CPU, fp32: " in done.stdout
    # --dry_run stops half-way, as a cluster would; the step after it agrees on that.
    assert ("resuming from step-00000003, step 3" in done.stdout) == ("--dry_run" in words)
    keys = ("step", "loss", "lr", "grad_norm", "tokens", "validation_loss", "bits_per_byte")
    return [{key: line[key] for key in keys if key in line} for line in read_metrics(run_folder)]


@pytest.fixture(scope="module", params=MODELS)
def one_process(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    clean_environment: dict[str, str],
) -> tuple[str, list[dict[str, Any]]]:
    """Return a model, and its curve on one process without a wrapper."""
    folder = tmp_path_factory.mktemp("one")
    curve = train(folder, request.param, "ddp", 1, clean_environment)
    assert [line["step"] for line in curve] == list(range(5))
    assert curve[4]["loss"] < curve[1]["loss"] - 0.1
    assert all(line["grad_norm"] > 0.5 for line in curve[1:]), "clipping took no part"
    return request.param, curve


@pytest.mark.computes(2)
@pytest.mark.parametrize("accel", ranks.STRATEGIES)
def test_two_processes_train_as_one_and_after_a_stop_to_the_last_bit(
    one_process: tuple[str, list[dict[str, Any]]],
    clean_environment: dict[str, str],
    tmp_path: Path,
    accel: str,
) -> None:
    model, expected = one_process
    straight = train(tmp_path / "straight", model, accel, 2, clean_environment)
    for line, expected_line in zip(straight, expected, strict=True):
        assert line == pytest.approx(expected_line, abs=TOLERANCE)
    stopped = train(tmp_path / "stopped", model, accel, 2, clean_environment, "--dry_run")
    assert stopped == straight
