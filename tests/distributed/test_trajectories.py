"""The loss trajectory does not depend on strategy, accumulation, processes, or being stopped."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT, LAUNCH_TIMEOUT_S, Launch, launch_command, read_metrics

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
# fp32 sums of 512 terms of size 6, taken in another order, differ by a few units in the last
# place (5e-7); eight optimizer steps do not amplify that beyond this.
TOLERANCE = 1e-5
Trajectory = list[dict[str, Any]]


@pytest.fixture(scope="module")
def trajectories(
    tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> dict[tuple[str, int, int, str], Trajectory]:
    """Return the trajectory of each (strategy, processes, accumulation, straight or resumed)."""
    found = {}
    for accel in STRATEGIES:
        for num_processes in (1, 2):
            folder = tmp_path_factory.mktemp(f"{accel}-{num_processes}")
            module = "tests.distributed.worker_trajectories"
            done = subprocess.run(
                launch_command(accel, num_processes, module, str(folder)),
                check=False,
                cwd=CHECKOUT,
                env=clean_environment
                | {"SLUICE_WORLD_SIZE": str(num_processes), "SLUICE_DEVICE": "cpu"},
                capture_output=True,
                text=True,
                timeout=LAUNCH_TIMEOUT_S,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            for run in folder.iterdir():
                accumulation, how = run.name.removeprefix("accumulation").split("-")
                lines = [_arithmetic(line) for line in read_metrics(run)]
                found[accel, num_processes, int(accumulation), how] = lines
    return found


def _arithmetic(line: dict[str, Any]) -> dict[str, Any]:
    """Return what follows from the arithmetic, without times and memory."""
    keys = ("step", "loss", "lr", "grad_norm", "tokens", "validation_loss", "bits_per_byte")
    return {key: line[key] for key in keys if key in line}


def test_every_combination_ran_all_steps(trajectories: dict[Any, Trajectory]) -> None:
    assert len(trajectories) == 5 * 2 * 2 * 2
    for trajectory in trajectories.values():
        assert [line["step"] for line in trajectory] == list(range(9))


def test_stopped_and_resumed_equals_straight_bit_for_bit(
    trajectories: dict[Any, Trajectory],
) -> None:
    for (*combination, how), trajectory in trajectories.items():
        if how == "resumed":
            assert trajectory == trajectories[*combination, "straight"], combination


def test_strategies_that_add_in_the_same_order_are_equal_bit_for_bit(
    trajectories: dict[Any, Trajectory],
) -> None:
    # One process has nothing to reduce: sharding alone changes no arithmetic.
    for accumulation in (1, 4):
        assert (
            trajectories["ddp", 1, accumulation, "straight"]
            == trajectories["fsdp2", 1, accumulation, "straight"]
        )
    # ZeRO-1 and ZeRO-2 share DeepSpeed's flat partitions, so also its order within the norm.
    for num_processes in (1, 2):
        assert (
            trajectories["zero1", num_processes, 1, "straight"]
            == trajectories["zero2", num_processes, 1, "straight"]
        )


def test_all_combinations_agree_to_float_tolerance(trajectories: dict[Any, Trajectory]) -> None:
    # Not bit for bit: the batch is cut into other micro batches, gradients are summed in another
    # order, and the norm that clips is summed by parameter (ddp, fsdp2) or by partition (ZeRO).
    reference = trajectories["ddp", 1, 1, "straight"]
    for combination, trajectory in trajectories.items():
        for line, expected in zip(trajectory, reference, strict=True):
            assert line == pytest.approx(expected, abs=TOLERANCE), combination


def test_the_loss_falls_and_clipping_took_part(trajectories: dict[Any, Trajectory]) -> None:
    reference = trajectories["ddp", 1, 1, "straight"]
    assert reference[8]["loss"] < reference[1]["loss"] - 0.3
    assert all(line["grad_norm"] > 0.5 for line in reference[1:])


def test_another_strategy_and_world_size_continue_a_run(
    launch: Launch, tmp_path: Path, trajectories: dict[Any, Trajectory]
) -> None:
    settings = [
        *("--model.preset", "tiny", "--data.sequence_length", "64"),
        *("--data.train", "train/samples/train.txt"),
        *("--data.validation", "train/samples/validation.txt"),
        *("--batch.global_batch_size", "8", "--batch.micro_batch_size", "2"),
        *("--optimizer.lr", "3e-3", "--optimizer.max_grad_norm", "0.5"),
        *("--schedule.kind", "constant", "--schedule.warmup_steps", "4", "--export", "false"),
        *("--log_every_steps", "1", "--evaluation.max_tokens", "512"),
    ]

    def train(run_folder: Path, accel: str, num_processes: int, max_steps: int) -> None:
        ending = ("--run_folder", str(run_folder), "--max_steps", str(max_steps))
        done = launch(accel, num_processes, "train.tinyllama", *settings, *ending)
        assert done.returncode == 0, done.stderr

    straight, changing = tmp_path / "straight", tmp_path / "changing"
    train(straight, "ddp", 1, 8)
    train(changing, "zero3", 2, 3)
    train(changing, "ddp", 1, 5)
    train(changing, "fsdp2", 2, 7)
    train(changing, "zero2", 2, 8)
    expected = {line["step"]: line["loss"] for line in read_metrics(straight)[1:]}
    found = {line["step"]: line["loss"] for line in read_metrics(changing)[1:]}
    assert found == pytest.approx(expected, abs=TOLERANCE)
