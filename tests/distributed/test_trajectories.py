"""The loss trajectory does not depend on strategy, accumulation, processes, or being stopped."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT, LAUNCH_TIMEOUT_S, Launch, launch_command, read_metrics
from tests.distributed.strategies import STRATEGIES
from tests.distributed.worker_trajectories import DIVERGED

# All strategies in one fixture, on a machine that may be busy.
pytestmark = pytest.mark.timeout(900)
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
    for num_processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"on-{num_processes}")
        module = "tests.distributed.worker_trajectories"
        done = subprocess.run(
            launch_command("ddp", num_processes, module, str(folder)),
            check=False,
            cwd=CHECKOUT,
            env=clean_environment
            | {"SLUICE_WORLD_SIZE": str(num_processes), "SLUICE_DEVICE": "cpu"},
            capture_output=True,
            text=True,
            timeout=2 * LAUNCH_TIMEOUT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found |= {(accel, num_processes): folder / accel for accel in STRATEGIES}
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
        assert all(line["loss"] < 1e30 for line in read_metrics(run)[1:]), combination


Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def train(launch: Launch) -> Train:
    """Return a function that trains to `max_steps` and returns the lines with a loss."""

    def run(folder: Path, accel: str, num_processes: int, max_steps: int, *more: str) -> Trajectory:
        ending = ("--run_folder", str(folder), "--max_steps", str(max_steps), *more)
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "inductor")}
        arguments = (*CONSTANT, *ending)
        done = launch(accel, num_processes, "train.tinyllama", *arguments, environment=environment)
        assert done.returncode == 0, done.stderr
        return read_metrics(folder)[1:]

    return run


def test_another_strategy_and_world_size_continue_a_run(train: Train, tmp_path: Path) -> None:
    expected = train(tmp_path / "straight", "ddp", 1, 8)
    changing = tmp_path / "changing"
    train(changing, "zero3", 2, 3)
    train(changing, "ddp", 1, 5)
    train(changing, "fsdp2", 2, 7)
    found = train(changing, "zero2", 2, 8)
    assert _losses(found) == pytest.approx(_losses(expected), abs=TOLERANCE)


@pytest.mark.needs("c++")
def test_compiled_layers_give_the_same_curve(train: Train, tmp_path: Path) -> None:
    expected = train(tmp_path / "eager", "ddp", 1, 4)
    found = train(tmp_path / "compiled", "ddp", 1, 4, "--compile")
    assert _losses(found) == pytest.approx(_losses(expected), abs=TOLERANCE)
    assert any((tmp_path / "inductor").iterdir()), "nothing was compiled"


def _losses(lines: Trajectory) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines}
