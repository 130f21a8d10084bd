"""What travels between processes: how many bytes, and what bf16 does to a loss curve."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean

import pytest

from tests import ranks
from tests.conftest import read_metrics
from tests.real.train.worker_wire import SETTINGS
from tests.shared import CHECKOUT

# A parameter and step, all of two processes; over gloo, which sends a reduce-scatter as an
# all-reduce.
BYTES = {
    "ddp": (8, 8, 4),
    "zero1": (12, 12, 8),
    "zero2": (12, 12, 8),
    "zero3": (12, 12, 6),
    "fsdp2": (16, 12, 8),
}


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> dict[str, Path]:
    """Return the folder that the worker wrote under each strategy, on two processes."""
    folders = {}
    for accel in BYTES:
        folders[accel] = folder = tmp_path_factory.mktemp(accel)
        words = ("tests.real.train.worker_wire", str(folder))
        done = ranks.run(accel, 2, *words, environment=clean_environment)
        assert done.returncode == 0, done.stdout + done.stderr
    return folders


@pytest.mark.computes(2)
@pytest.mark.parametrize("accel", BYTES)
def test_a_step_sends_so_many_bytes_a_parameter(found: dict[str, Path], accel: str) -> None:
    counted = json.loads((found[accel] / "bytes.json").read_text())
    assert list(counted) == [" ".join(setting) for setting in SETTINGS]
    # Norms, counts and the loss travel in fp32, and gloo adds its own words.
    assert list(counted.values()) == pytest.approx(BYTES[accel], rel=0.002)


def test_the_page_has_these_figures() -> None:
    page = (CHECKOUT / "docs" / "strategies.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert {name: tuple(map(int, figures)) for name, *figures in rows} == BYTES


def losses(run: Path) -> list[float]:
    """Return the loss of the batch of each step."""
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def tens(curve: list[float]) -> list[float]:
    """Return the mean of each ten steps."""
    return [mean(curve[start : start + 10]) for start in range(0, len(curve), 10)]


@pytest.mark.computes(2)
def test_a_curve_in_bf16_is_that_in_fp32_within_a_hundredth(found: dict[str, Path]) -> None:
    expected = losses(found["ddp"] / "fp32")
    assert len(expected) == 300 and expected[-1] < expected[0] / 2
    for accel in ("ddp", "zero2", "zero3", "fsdp2"):
        curve = losses(found[accel] / "bf16")
        # A single batch of eight short sequences may differ by twice as much.
        assert tens(curve) == pytest.approx(tens(expected), rel=0.01), accel
