"""benchmarks/gpu.py: its plan, its budget and its ratios; tests/real/benchmarks runs the trials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from runfolder.errors import UserError

SMALLEST = ["--device=cpu", "--preset=tiny", "--sequence_length=64", "--global_batch_size=8"]
SMALLEST += ["--compile=eager"]


class Clock:
    """Time that passes only while a trial runs, which may take longer than it is allowed."""

    def __init__(self, trial_s: float) -> None:
        self.now, self.trial_s = 1000.0, trial_s
        self.limits: list[float] = []

    def run_trial(self, *arguments: Any) -> dict[str, Any]:
        limit_s = arguments[-1]
        self.limits.append(limit_s)
        seconds = min(limit_s, self.trial_s)
        self.now += seconds
        if self.trial_s > limit_s:
            return {"status": "timed_out", "reason": "", "seconds": seconds}
        figures = {f"tokens_per_second_{name}": 100.0 for name in ("p10", "median", "p90")}
        figures |= {f"peak_memory_{name}_gib": 1.0 for name in ("allocated", "reserved")}
        figures |= {"mfu": 0.5, "first_step_seconds": 1.0}
        return {"status": "measured", "seconds": seconds, **figures}


@pytest.mark.parametrize(
    ("trial_s", "statuses"),
    [
        # 24 s for all, of which 6 are kept for the end.
        (5.0, ["measured"] * 3 + ["skipped"] * 3),
        (2.0, ["measured"] * 6),
        (100.0, ["timed_out"] * 1 + ["skipped"] * 5),
    ],
)
def test_the_budget_is_kept_and_what_was_left_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trial_s: float, statuses: list[str]
) -> None:
    clock = Clock(trial_s)
    monkeypatch.setattr(gpu, "run_trial", clock.run_trial)
    words = [*SMALLEST, "--micro_batch_sizes=2,4,8", "--budget_s=24", f"--results={tmp_path}"]
    code = gpu.main(words, lambda: clock.now)
    assert code == (0 if "measured" in statuses else 1)
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [one["status"] for one in found["trials"]] == statuses
    for one in found["trials"]:
        assert one["status"] != "skipped" or "out of time" in one["reason"]
    assert clock.limits == [18 - trial_s * number for number in range(len(clock.limits))]
    assert found["seconds"] <= 18


def test_a_trial_that_takes_longer_than_it_may_is_ended_by_force(tmp_path: Path) -> None:
    config = gpu.Config(device="cpu", preset="tiny", sequence_length=64)
    trial = gpu.Trial(implementation="engine", compile="eager", micro_batch_size=4)
    outcome = gpu.run_trial(config, trial, tmp_path, tmp_path, tmp_path, limit_s=0)
    assert (outcome["status"], outcome["reason"]) == ("timed_out", "no result within 0 s")
    assert list(tmp_path.iterdir()) == []


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
