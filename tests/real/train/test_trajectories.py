"""The loss trajectory does not depend on strategy, accumulation, processes, or being stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.conftest import read_metrics
from tests.real.train.worker_trajectories import DIVERGED

# fp32 sums of 512 terms of size 6, taken in another order, differ by a few units in the last
# place (5e-7); eight optimizer steps do not amplify that beyond this.
TOLERANCE = 1e-5
Trajectory = list[dict[str, Any]]
# A schedule that does not look at max_steps: a run that ends early is a part of a longer one.
CONSTANT = [
    *("--model.preset", "tiny", "--data.sequence_length", "64"),
    *("--data.train", "train/samples/train.txt"),
    *("--data.validation", "train/samples/validation.txt"),
    *("--batch.global_batch_size", "8", "--batch.micro_batch_size", "2"),
    *("--optimizer.lr", "3e-3", "--optimizer.max_grad_norm", "0.5"),
    *("--schedule.kind", "constant", "--schedule.warmup_steps", "4", "--export", "false"),
    *("--log_every_steps", "1", "--evaluation.max_tokens", "512"),
]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> dict[tuple[str, int], Path]:
    """Return the folder of the runs of each (strategy, number of processes)."""
    found = {}
    for accel in ranks.STRATEGIES:
        for num_processes in (1, 2):
            folder = tmp_path_factory.mktemp(f"{accel}-on-{num_processes}")
            words = ("tests.real.train.worker_trajectories", str(folder))
            done = ranks.run(accel, num_processes, *words, environment=clean_environment)
            assert done.returncode == 0, done.stdout + done.stderr
            assert f"{accel}, {num_processes} x CPU, fp32: " in done.stdout
            assert done.stdout.count("resuming from step-00000005, step 5\n") == 2 - num_processes
            found[accel, num_processes] = folder
    return found


@pytest.fixture(scope="module")
def trajectories(
    runs: dict[tuple[str, int], Path],
) -> dict[tuple[str, int, int, str], Trajectory]:
    """Return the trajectory of each (strategy, processes, accumulation, straight or resumed)."""
    found = {}
    for (accel, num_processes), folder in runs.items():
        for run in folder.glob("accumulation*"):
            accumulation, how = run.name.removeprefix("accumulation").split("-")
            lines = [_arithmetic(line) for line in read_metrics(run)]
            found[accel, num_processes, int(accumulation), how] = lines
    return found


def _arithmetic(line: dict[str, Any]) -> dict[str, Any]:
    """Return what follows from the arithmetic, without times and memory."""
    keys = ("step", "loss", "lr", "grad_norm", "tokens", "validation_loss", "bits_per_byte")
    return {key: line[key] for key in keys if key in line}


@pytest.mark.computes(2)
def test_every_combination_ran_all_steps(trajectories: dict[Any, Trajectory]) -> None:
    assert len(trajectories) == 5 * 2 * 2 + 5
    for trajectory in trajectories.values():
        assert [line["step"] for line in trajectory] == list(range(9))


def test_stopped_and_resumed_equals_straight_bit_for_bit(
    trajectories: dict[Any, Trajectory],
) -> None:
    for accel in ranks.STRATEGIES:
        assert trajectories[accel, 1, 4, "resumed"] == trajectories[accel, 1, 4, "straight"], accel


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


def test_a_loss_that_is_not_finite_ends_the_run_and_says_where(
    runs: dict[tuple[str, int], Path],
) -> None:
    for combination, folder in runs.items():
        run = folder / DIVERGED
        said = {file.read_text() for file in run.glob("error-*")}
        # Every rank says it, and the same.
        assert len(list(run.glob("error-*"))) == combination[1], combination
        (error,) = said
        assert "is not finite (rank 0, positions " in error, combination
        # What diverged was not trained on: every line that was logged is finite.
        trained = read_metrics(run)[1:]
        assert trained and all(line["loss"] < 1e30 for line in trained), combination


Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def train(clean_environment: dict[str, str]) -> Train:
    """Return a function that trains to `max_steps` and returns the lines with a loss."""

    def run(folder: Path, accel: str, num_processes: int, max_steps: int) -> Trajectory:
        words = [*CONSTANT, "--run_folder", str(folder), "--max_steps", str(max_steps)]
        done = ranks.run(
            accel, num_processes, "train.tinyllama", *words, environment=clean_environment
        )
        assert done.returncode == 0, done.stderr
        return read_metrics(folder)[1:]

    return run


@pytest.mark.computes(2)
def test_another_strategy_and_world_size_continue_a_run(train: Train, tmp_path: Path) -> None:
    expected = train(tmp_path / "straight", "ddp", 1, 8)
    changing = tmp_path / "changing"
    train(changing, "zero3", 2, 3)
    train(changing, "ddp", 1, 5)
    train(changing, "fsdp2", 2, 7)
    found = train(changing, "zero2", 2, 8)
    assert _losses(found) == pytest.approx(_losses(expected), abs=TOLERANCE)


def test_compiled_layers_give_the_same_curve(
    train: Train, clean_environment: dict[str, str], tmp_path: Path
) -> None:
    expected = train(tmp_path / "eager", "ddp", 1, 4)
    words = [*CONSTANT, "--max_steps", "4", "--compile", "--run_folder", str(tmp_path / "compiled")]
    done = ranks.run(
        "ddp", 1, "tests.real.train.worker_compiled", *words, environment=clean_environment
    )
    assert done.returncode == 0, done.stderr
    found = read_metrics(tmp_path / "compiled")[1:]
    assert _losses(found) == pytest.approx(_losses(expected), abs=TOLERANCE)
    # A layer, once for both of them, in training and in evaluation; and the loss, for both alike.
    assert done.stdout.endswith("graphs: 3\n"), done.stdout[-30:]


def _losses(lines: Trajectory) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines}
