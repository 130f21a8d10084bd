"""benchmarks/gpu.py, run for real on the CPU with the smallest model."""

from __future__ import annotations

import json
import math
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from train.engine.errors import UserError

SMALLEST = ["--device=cpu", "--preset=tiny", "--sequence_length=64", "--global_batch_size=8"]
SMALLEST += ["--micro_batch_sizes=4", "--compile=eager", "--lr=3e-3", "--steps=6"]
SMALLEST += ["--warmup_steps=2"]


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_both_sides_start_from_the_same_loss_and_learn(found: dict[str, Any]) -> None:
    engine, trainer = trial(found, "engine"), trial(found, "trainer")
    for one in (engine, trainer):
        assert math.isfinite(one["first_loss"]) and one["last_loss"] < one["first_loss"]
    # The Trainer leaves out the last token of a sequence, which has no target there.
    assert trainer["first_loss"] == pytest.approx(engine["first_loss"], rel=0.01)
    assert trainer["last_loss"] == pytest.approx(engine["last_loss"], rel=0.05)


@pytest.mark.slow
def test_the_ratio_follows_from_the_figures_of_the_record(found: dict[str, Any]) -> None:
    key = "tokens_per_second_median"
    expected = trial(found, "engine")[key] / trial(found, "trainer")[key]
    assert [one["kind"] for one in found["ratios"]] == ["same settings", "best of each"]
    assert all(one["ratio"] == pytest.approx(expected) for one in found["ratios"])


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_trial_without_memory_is_a_result_and_larger_ones_are_not_tried(tmp_path: Path) -> None:
    more = ["--global_batch_size=1024", "--micro_batch_sizes=512,1024", "--memory_limit_gib=0.2"]
    found = run(tmp_path, *more)
    outcomes = {(one["implementation"], one["micro_batch_size"]): one for one in found["trials"]}
    assert [outcomes[side, 512]["status"] for side in ("engine", "trainer")] == [
        "out_of_memory"
    ] * 2
    for side in ("engine", "trainer"):
        assert outcomes[side, 1024]["status"] == "skipped"
        assert "micro batch 512 ran out of memory" in outcomes[side, 1024]["reason"]
    assert found["ratios"] == []


@pytest.mark.slow
def test_the_budget_is_kept_and_what_was_left_out_is_said(tmp_path: Path) -> None:
    started = time.monotonic()
    found = run(tmp_path, "--micro_batch_sizes=2,4,8", "--budget_s=12")
    assert time.monotonic() - started < 15
    statuses = [one["status"] for one in found["trials"]]
    assert len(statuses) == 6 and "skipped" in statuses
    skipped = [one for one in found["trials"] if one["status"] == "skipped"]
    assert all("out of time" in one["reason"] for one in skipped)


def measured(**values: Any) -> dict[str, Any]:
    """Return a trial's outcome as the record holds it."""
    one = {"implementation": "engine", "compile": "eager", "attention": "default"}
    one |= {"micro_batch_size": 8, "status": "measured", "tokens_per_second_median": 100.0}
    return one | values


def test_a_candidate_is_compared_apart_from_what_the_engine_does() -> None:
    trials = [
        measured(),
        measured(compile="model", tokens_per_second_median=150.0),
        measured(implementation="trainer", tokens_per_second_median=80.0),
        measured(implementation="trainer", compile="model", status="failed"),
    ]
    found = {one["kind"]: one["ratio"] for one in gpu.ratios(trials)}
    assert found == {
        "same settings": 100 / 80,
        "best of each": 100 / 80,
        "best, candidates too": 150 / 80,
    }


def test_what_matters_most_is_tried_first() -> None:
    trials = gpu.plan(gpu.Config())
    assert [str(one) for one in trials[:7]] == [
        "engine, eager, micro batch 16",
        "trainer, eager, micro batch 16",
        "engine, layers, micro batch 16",
        "engine, model, micro batch 16",
        "trainer, model, micro batch 16",
        "engine, layers, cudnn attention, micro batch 16",
        "engine, layers, flash attention, micro batch 16",
    ]
    assert len(set(trials)) == len(trials) == 4 * 5 + 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--micro_batch_sizes=3", "'3' does not divide global_batch_size 32"),
        ("--compile=fast", "'fast' is not one of eager, layers, model"),
        ("--sequence_length=4096", "4096 is not from 2 to 2048"),
        ("--preset=huge", "'huge' is not one of"),
    ],
)
def test_a_wrong_setting_is_answered_before_anything_runs(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        gpu.main([setting])
