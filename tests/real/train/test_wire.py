"""What travels between processes: how many bytes, and what bf16 does to a loss curve."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.scale import STRATEGIES, sent, wire
from tests import ranks
from tests.conftest import read_metrics
from tests.real.train.worker_wire import SETTINGS

SIZES = (2, 4)


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> dict[tuple[str, int], Path]:
    """Return the folder that the worker wrote under each strategy, on two and four processes."""
    folders = {}
    for accel, size in itertools.product(STRATEGIES, SIZES):
        folders[accel, size] = folder = tmp_path_factory.mktemp(f"{accel}-on-{size}")
        words = ("tests.real.train.worker_wire", str(folder))
        done = ranks.run(accel, size, *words, environment=clean_environment)
        assert done.returncode == 0, done.stdout + done.stderr
    return folders


@pytest.mark.computes(2)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("accel", STRATEGIES)
def test_a_step_sends_so_many_bytes_a_parameter(
    found: dict[tuple[str, int], Path], accel: str, size: int
) -> None:
    counted = json.loads((found[accel, size] / "bytes.json").read_text())
    each = [sent(accel, size, wire(accel, *s), micro_batches=1, gloo=True) for s in SETTINGS]
    # Norms, counts and the loss travel in fp32, and gloo adds words of its own.
    assert list(counted.values()) == pytest.approx([size * one for one in each], rel=0.005)


def losses(run: Path) -> list[float]:
    """Return the loss of the batch of each step."""
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def tens(curve: list[float]) -> list[float]:
    """Return the mean of each ten steps."""
    return [mean(curve[start : start + 10]) for start in range(0, len(curve), 10)]


@pytest.mark.computes(2)
def test_a_curve_in_bf16_is_that_in_fp32_within_a_hundredth(
    found: dict[tuple[str, int], Path],
) -> None:
    expected = losses(found["ddp", 2] / "fp32")
    assert len(expected) == 300 and expected[-1] < expected[0] / 2
    for accel in ("ddp", "zero2", "zero3", "fsdp2"):
        curve = losses(found[accel, 2] / "bf16")
        # A single batch of eight short sequences may differ by twice as much.
        assert tens(curve) == pytest.approx(tens(expected), rel=0.01), accel
