"""benchmarks/gpu.py, run for real on the CPU with the smallest model."""

from __future__ import annotations

import json
import math
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

pytestmark = pytest.mark.computes(1)

SMALLEST = ["--device=cpu", "--preset=tiny", "--sequence_length=64", "--global_batch_size=8"]
SMALLEST += ["--micro_batch_sizes=4", "--compile=eager", "--lr=3e-3", "--steps=6"]
SMALLEST += ["--warmup_steps=2", "--budget_s=3600", "--trial_limit_s=1800"]


def run(folder: Path, *more: str) -> dict[str, Any]:
    """Run the benchmark; return the record that it leaves."""
    gpu.main([*SMALLEST, *more, f"--results={folder}"])
    (path,) = folder.glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the record of a run with one trial of each side."""
    return run(tmp_path_factory.mktemp("results"))


def trial(found: dict[str, Any], implementation: str) -> dict[str, Any]:
    """Return the only trial of a side."""
    (one,) = [one for one in found["trials"] if one["implementation"] == implementation]
    return dict(one)


@pytest.mark.parametrize("implementation", ["engine", "trainer"])
def test_each_side_trains_and_is_timed(found: dict[str, Any], implementation: str) -> None:
    one = trial(found, implementation)
    assert one["status"] == "measured"
    assert (one["warmup_steps_excluded"], one["steps_timed"]) == (2, 6)
    rates = [one[f"tokens_per_second_{name}"] for name in ("p10", "median", "p90")]
    assert 0 < rates[0] <= rates[1] <= rates[2]
    # 6 N + 12 L d T of the preset: N without the embedding, whose look-ups do not multiply.
    assert one["flops_per_token"] == 6 * (one["parameters"] - 512 * 64) + 12 * 2 * 64 * 64
    assert one["mfu"] is None, "a CPU has no peak in the table, so no MFU"
    assert one["peak_memory_allocated_gib"] > 0


def test_both_sides_start_from_the_same_loss_and_learn(found: dict[str, Any]) -> None:
    engine, trainer = trial(found, "engine"), trial(found, "trainer")
    for one in (engine, trainer):
        assert math.isfinite(one["first_loss"]) and one["last_loss"] < one["first_loss"]
    # The Trainer leaves out the last token of a sequence, which has no target there.
    assert trainer["first_loss"] == pytest.approx(engine["first_loss"], rel=0.01)
    assert trainer["last_loss"] == pytest.approx(engine["last_loss"], rel=0.05)


def test_the_ratio_follows_from_the_figures_of_the_record(found: dict[str, Any]) -> None:
    key = "tokens_per_second_median"
    expected = trial(found, "engine")[key] / trial(found, "trainer")[key]
    assert [one["kind"] for one in found["ratios"]] == ["same settings", "best of each"]
    assert all(one["ratio"] == pytest.approx(expected) for one in found["ratios"])


def test_the_record_tells_the_circumstances_but_no_host_and_no_path(found: dict[str, Any]) -> None:
    circumstances = found["circumstances"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", circumstances["date"])
    assert circumstances["packages"]["torch"] and circumstances["packages"]["transformers"]
    assert {"git", "python", "system", "cpu", "memory_gib", "gpu"} <= circumstances.keys()
    assert "arXiv:2204.02311" in found["convention"]
    assert found["workload"]["sequence_length"] == 64
    text = json.dumps(found)
    assert socket.gethostname() not in text
    assert not re.search(r'"[^"]*/(?:home|root|tmp|usr|opt)/', text)


def test_a_trial_without_memory_is_a_result_and_larger_ones_are_not_tried(tmp_path: Path) -> None:
    more = ["--global_batch_size=1024", "--micro_batch_sizes=512,1024", "--memory_limit_gib=0.2"]
    found = run(tmp_path, *more)
    outcomes = {(one["implementation"], one["micro_batch_size"]): one for one in found["trials"]}
    assert [outcomes[side, 512]["status"] for side in ("engine", "trainer")] == [
        "out_of_memory"
    ] * 2
    for side in ("engine", "trainer"):
        assert outcomes[side, 1024]["status"] == "skipped"
        assert "micro batch 512 already ran out of memory" in outcomes[side, 1024]["reason"]
    assert found["ratios"] == []
