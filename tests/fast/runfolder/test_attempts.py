"""runfolder/attempts.py: attempts are counted, and each says how it ended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from runfolder import attempts
from runfolder.attempts import write_outcome
from runfolder.lock import lock


def outcomes(run: Path) -> dict[str, Any]:
    return {
        path.parent.name: json.loads(path.read_text())
        for path in run.glob("attempts/*/outcome.json")
    }


def test_an_outcome_belongs_to_its_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLUICE_ATTEMPT", raising=False)
    write_outcome(tmp_path, outcome="stopped", step=3)
    monkeypatch.setenv("SLUICE_ATTEMPT", "2")
    write_outcome(tmp_path, outcome="stopped", step=4)
    write_outcome(tmp_path, outcome="finished", step=5)
    assert outcomes(tmp_path) == {
        "1": {"outcome": "stopped", "step": 3},
        "2": {"outcome": "finished", "step": 5},
    }
    assert [path.name for path in (tmp_path / "attempts/2").iterdir()] == ["outcome.json"]


def test_an_outcome_without_a_step_is_at_the_newest_checkpoint(tmp_path: Path) -> None:
    for name in ("step-00000007", "step-00000012", ".step-00000020", "step-00000030.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    write_outcome(tmp_path, number=1, outcome="failed", exit_code=1)
    assert outcomes(tmp_path) == {"1": {"outcome": "failed", "step": 12, "exit_code": 1}}


def test_attempts_count_on_and_one_that_was_killed_is_said_to_be(tmp_path: Path) -> None:
    assert attempts.begin(tmp_path) == 1
    (tmp_path / "attempts/unrelated").mkdir()
    # `make run` was killed; `make submit RUN=` goes on with it.
    assert attempts.begin(tmp_path, {"job_id": 12, "nodes": ["a"]}) == 2
    assert outcomes(tmp_path) == {"1": {"outcome": "lost", "step": 0, "reason": "it was killed"}}
    # A node died, and Slurm started the job again.
    assert attempts.begin(tmp_path, {"job_id": 12, "nodes": ["b"]}) == 3
    assert outcomes(tmp_path)["2"]["reason"] == "Slurm ended it"
    # What `make run` cannot know of another's job, it does not say.
    assert attempts.begin(tmp_path) == 4
    assert "3" not in outcomes(tmp_path)
    assert [each.nodes for each in attempts.read_all(tmp_path)] == [[], ["a"], ["b"], []]


def test_an_attempt_that_still_runs_is_not_said_to_be_lost(tmp_path: Path) -> None:
    attempts.begin(tmp_path)
    held = lock(tmp_path)
    attempts.begin(tmp_path, {"job_id": 12})
    assert outcomes(tmp_path) == {}
    os.close(held)
    attempts.close_last(tmp_path, by_job=True)
    assert list(outcomes(tmp_path)) == ["2"]
