"""The attempts of a job: counted, ended, continued or given up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from runfolder import attempts, heartbeats, launch
from slurm import attempt
from tests import waiting
from tests.shared import CHECKOUT


class Job:
    """A job as Slurm would run it, with the files that training would leave."""

    def __init__(self, run: Path, capfd: pytest.CaptureFixture[str], max_restarts: int = 3) -> None:
        self.run, self.capfd, self.max_restarts = run, capfd, max_restarts
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.restarts = 0

    def environment(self) -> dict[str, str]:
        launch.write(self.run, {"max_restarts": str(self.max_restarts)}, {})
        number = max(attempts.numbers(self.run), default=1)
        return os.environ | {"SLUICE_RUN_FOLDER": str(self.run), "SLUICE_ATTEMPT": str(number)}

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        with mock.patch.dict(os.environ, self.environment()):
            code = attempt.main([*words])
        output, errors = self.capfd.readouterr()
        return subprocess.CompletedProcess(words, code, output, errors)

    def begin(self, job: int = 12) -> subprocess.CompletedProcess[str]:
        words = ["begin", "--job", str(job), "--restarts", str(self.restarts)]
        self.restarts += 1
        return self.call(*words, "--nodes", "node1 node2")

    def end(self, code: int, *more: str, state: str = "RUNNING") -> list[str]:
        done = self.call("end", "--code", str(code), "--state", state, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    def train(self, step: int, outcome: str = "") -> None:
        """Leave what training leaves: a checkpoint, and an outcome if it could write one."""
        (self.run / f"checkpoints/step-{step:08}").mkdir(exist_ok=True)
        if outcome:
            content = {"outcome": outcome, "step": step, "reason": "SIGUSR1"}
            (self.newest() / "outcome.json").write_text(json.dumps(content))

    def newest(self) -> Path:
        return max((self.run / "attempts").iterdir(), key=lambda folder: int(folder.name))

    def outcome(self, attempt: int) -> dict[str, Any]:
        path = self.run / f"attempts/{attempt}/outcome.json"
        return dict(json.loads(path.read_text()))


@pytest.fixture
def job(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Job:
    # Which address this machine has, if any, is not what is tried here (test_rendezvous.py).
    monkeypatch.setattr(attempt, "meeting_point", lambda **said: ("10.0.0.1", 23456))
    return Job(tmp_path / "run", capfd)


def test_the_batch_script_reads_the_attempt_and_the_decision(job: Job) -> None:
    def command(*words: str) -> tuple[int, str]:
        program = [sys.executable, "-m", "slurm.attempt"]
        done = waiting.run([*program, *words], cwd=CHECKOUT, env=job.environment())
        return done.returncode, done.stdout

    words = ("--job", "12", "--restarts", "0", "--nodes", "node1", "--by-name", "127.0.1.1 STREAM")
    assert command("begin", *words, "--interface", "") == (2, "")
    assert not (job.run / "attempts/1").exists()
    code, said = command("begin", *words)
    assert (code, said.split()[:2]) == (0, ["1", "127.0.0.1"])
    assert command("end", "--code", "75", "--state", "RUNNING") == (0, "requeue \n")


def test_attempts_are_numbered_over_requeues_and_over_the_jobs_of_a_run(job: Job) -> None:
    for number in (1, 2):
        done = job.begin()
        assert (done.returncode, done.stdout) == (0, f"{number} 10.0.0.1 23456\n")
        job.train(number, "stopped")
        assert job.end(0) == ["requeue"]
    job.restarts = 0
    assert job.begin(13).stdout.split()[0] == "3"
    record = json.loads((job.newest() / "slurm.json").read_text())
    assert (record["job_id"], record["nodes"], record["step"]) == (13, ["node1", "node2"], 2)


def test_a_job_that_saved_at_its_limit_goes_on_without_end(job: Job) -> None:
    for step in range(1, 9):
        job.begin()
        job.train(step, "stopped")
        assert job.end(0) == ["requeue"], "progress was made, however often"
    job.begin()
    job.train(9, "finished")
    assert job.end(0) == ["stop"]
    assert job.outcome(9)["next"] == "stop"


def test_a_job_whose_packages_changed_is_not_started_again(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / "share").mkdir()
    (tmp_path / "share/extra.txt").write_text("trl==1\n")
    (job.run / "run.json").write_text('{"extra_packages": {"trl": "1"}}')
    assert job.begin().returncode == 0
    job.train(5, "stopped")
    assert job.end(0) == ["requeue"]
    (tmp_path / "share/extra.txt").write_text("trl==2\n")
    done = job.begin()
    assert (done.returncode, done.stdout) == (attempt.GIVEN_UP, "")
    assert done.stderr.startswith("error: not started again: the extra packages now are not")
    assert len(done.stderr.splitlines()) == 1
    assert attempts.numbers(job.run) == [1]
    assert (job.outcome(1)["outcome"], job.outcome(1)["next"]) == ("stopped", "stop")
    assert "trl was 1 and is 2" in job.outcome(1)["why"]


def test_a_job_without_progress_ends_and_says_why(job: Job) -> None:
    job.begin()
    job.train(5, "stopped")
    assert job.end(0) == ["requeue"]
    job.begin()
    assert job.end(137) == ["requeue"]
    job.begin()
    assert job.end(137) == ["stop"]
    assert job.outcome(3)["why"] == "2 attempts in a row made no progress (step 5)"
    assert job.outcome(3)["outcome"] == "failed"


def test_a_job_that_is_always_asked_to_stop_before_its_first_step_ends_too(job: Job) -> None:
    for _ in range(4):
        job.begin()
        assert job.end(75) == ["requeue"], "once may be chance"
    job.begin()
    assert job.end(75) == ["stop"]
    assert job.outcome(5)["why"] == "5 attempts in a row made no progress (step 0)"


def test_failures_are_capped_even_with_progress(job: Job) -> None:
    job.max_restarts = 2
    for step in (1, 2):
        job.begin()
        job.train(step)
        assert job.end(1) == ["requeue"]
    job.begin()
    job.train(3)
    assert job.end(1) == ["stop"]
    assert "3 attempts failed, and resources.max_restarts is 2" in job.outcome(3)["why"]
    # Whoever submits it again begins to count anew.
    job.restarts = 0
    job.begin(99)
    job.train(4)
    assert job.end(1) == ["requeue"]


def test_an_attempt_whose_node_died_is_recorded_by_the_next_which_may_give_up(job: Job) -> None:
    job.begin()
    job.train(3)
    assert job.begin().returncode == 0
    assert job.outcome(1)["outcome"] == "lost"
    # Slurm requeues after a node's death without asking.
    for _ in range(4):
        assert job.begin().returncode == 0
    done = job.begin()
    assert done.returncode == 4
    assert "no progress" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (job.run / "attempts/7").exists()


def test_losing_nodes_is_no_failure_as_long_as_there_is_progress(job: Job) -> None:
    for step in range(1, 9):
        assert job.begin().returncode == 0
        job.train(step)
    assert job.begin().returncode == 0


def test_a_signal_that_came_too_early_is_no_failure(job: Job) -> None:
    job.begin()
    assert job.end(138, "--asked", "USR1") == ["requeue"]
    assert job.outcome(1)["outcome"] == "stopped"
    # What the nodes had found until then is no verdict on them.
    job.begin()
    (job.newest() / "preflight").mkdir()
    verdict = {"healthy": False, "guilty": ["node2"], "suspects": [], "problems": ["ended"]}
    (job.newest() / "preflight/verdict.json").write_text(json.dumps(verdict))
    assert job.end(75, "--asked", "TERM") == ["requeue"]


def test_where_slurm_cannot_be_asked_the_job_is_queued_again(job: Job) -> None:
    job.begin()
    job.train(4, "stopped")
    assert job.end(0, state="") == ["requeue"]


def test_bad_input_is_not_tried_again(job: Job) -> None:
    job.begin()
    assert job.end(2) == ["stop"]
    assert "node-0.log" in job.outcome(1)["why"]


def test_an_unfit_allocation_is_left_without_its_bad_nodes(job: Job) -> None:
    job.begin()
    (job.newest() / "preflight").mkdir()
    verdict = {"healthy": False, "guilty": ["node2", "node7"], "problems": ["node2: cold"]}
    (job.newest() / "preflight/verdict.json").write_text(json.dumps(verdict))
    assert job.end(3, "--preflight") == ["requeue", "node2,node7"]
    assert job.outcome(1)["outcome"] == "unhealthy"
    # Finding bad nodes is no lack of progress.
    for _ in range(2):
        job.begin()
        assert job.end(3, "--preflight")[0] == "requeue"
    job.begin()
    assert job.end(3, "--preflight")[0] == "stop", "but it ends at max_restarts"


def test_where_it_cannot_be_told_which_node_it_is_all_are_left_out_and_it_is_tried_once_more(
    job: Job,
) -> None:
    verdict = {"healthy": False, "guilty": [], "suspects": ["node1", "node2"], "problems": ["slow"]}
    for decision in (["requeue", "node1,node2"], ["stop", "node1,node2"]):
        job.begin()
        (job.newest() / "preflight").mkdir()
        (job.newest() / "preflight/verdict.json").write_text(json.dumps(verdict))
        assert job.end(5, "--preflight") == decision
    assert job.outcome(2)["why"] == "2 attempts in a row made no progress (step 0)"


def test_where_no_node_is_to_blame_another_allocation_would_not_help(job: Job) -> None:
    job.begin()
    assert job.end(1, "--preflight") == ["stop"]


def test_a_cancel_ends_the_job_and_is_used_up(job: Job) -> None:
    job.begin()
    job.train(4, "stopped")
    (job.run / "cancel.json").write_text('{"job_id": 12}')
    assert job.end(0) == ["cancel"]
    assert job.outcome(1)["outcome"] == "cancelled"
    assert not (job.run / "cancel.json").exists()


def test_a_cancel_of_another_job_is_none(job: Job) -> None:
    job.begin()
    job.train(4, "stopped")
    (job.run / "cancel.json").write_text('{"job_id": 7}')
    assert job.end(0) == ["requeue"]


def test_a_job_that_slurm_cancelled_is_not_brought_back(job: Job) -> None:
    job.begin()
    job.train(4, "stopped")
    assert job.end(0, state="CANCELLED") == ["leave"]


def test_a_checkpoint_that_is_not_published_is_no_progress(job: Job) -> None:
    job.begin()
    (job.run / "checkpoints/step-00000009.unfinished").mkdir()
    (job.run / "checkpoints/step-00000007.damaged").mkdir()
    job.end(1)
    assert job.outcome(1)["step"] == 0


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"outcome": "stopped"}', "\x00"])
def test_damaged_records_of_earlier_attempts_do_not_stop_the_next(job: Job, damage: str) -> None:
    job.begin()
    (job.newest() / "outcome.json").write_text(damage)
    (job.newest() / "slurm.json").write_text(damage)
    assert job.begin().stdout.split()[0] == "2"
    assert job.end(75)


def test_a_job_that_slurm_does_not_queue_again_ends_with_its_checkpoint(job: Job) -> None:
    assert (
        job.call(
            *("begin", "--job", "12", "--restarts", "0", "--nodes", "node1"),
            *("--requeues", "no"),
        ).stdout.split()[0]
        == "1"
    )
    assert json.loads((job.newest() / "slurm.json").read_text())["requeues"] is False
    job.train(4, "stopped")
    assert job.end(75, "--requeues", "no") == ["stop"]
    outcome = job.outcome(1)
    assert (outcome["outcome"], outcome["step"], outcome["next"]) == ("stopped", 4, "stop")
    assert "Requeue=0" in outcome["why"]


def test_a_step_that_slurm_refuses_is_no_nodes_fault_and_tried_once_more(job: Job) -> None:
    why = "Memory required by task is not available"
    for decision in ("requeue", "stop"):
        job.begin()
        assert job.end(1, "--refused", why) == [decision]
        outcome = job.outcome(int(job.newest().name))
        assert (outcome["outcome"], outcome["reason"].endswith(why)) == ("failed", True)


@pytest.mark.parametrize(("code", "kept"), [(2, "as before"), (0, "as given"), (1, "as given")])
def test_settings_that_the_run_itself_refuses_are_not_kept(job: Job, code: int, kept: str) -> None:
    (job.run / "config.yaml").write_text("as given")
    (job.run / "config.before.yaml").write_text("as before")
    job.begin()
    job.end(code)
    assert (job.run / "config.yaml").read_text() == kept
    assert not (job.run / "config.before.yaml").exists()


def test_a_script_that_was_cut_off_does_not_end_the_attempt_of_another(job: Job) -> None:
    job.begin()
    mine = job.environment()
    job.begin()
    with mock.patch.object(job, "environment", lambda: mine):
        assert job.end(1) == ["leave"]
    assert not (job.run / "attempts/2/outcome.json").exists()
    assert job.outcome(1)["outcome"] == "lost"


def test_input_that_one_of_several_nodes_refuses_is_not_tried_again(job: Job) -> None:
    job.begin()
    (job.run / "config.yaml").write_text("new")
    (job.run / "config.before.yaml").write_text("as before")
    # As slurm/launch.py leaves it; srun killed the other node, and says so.
    attempts.write_outcome(job.run, number=1, outcome="failed", exit_code=2, reason="it refuses")
    assert job.end(137) == ["stop"]
    assert "the same input would fail again" in job.outcome(1)["why"]
    assert (job.run / "config.yaml").read_text() == "as before"


def test_a_cancel_is_forgotten_only_when_it_was_recorded(job: Job) -> None:
    job.begin()
    (job.run / "cancel.json").write_text('{"job_id": 12}')
    full = mock.patch.object(attempts, "annotate", side_effect=OSError("full"))
    with full, pytest.raises(OSError, match="full"):
        job.call("end", "--code", "0", "--state", "RUNNING")
    assert job.end(0) == ["cancel"]
    assert not (job.run / "cancel.json").exists()


# ---- a script that is not ours: docs/your-script.md ----


class Theirs(Job):
    """A job whose script writes no outcome, and checkpoints of its own."""

    def __init__(self, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
        super().__init__(run, capfd)
        (run / "run.json").write_text(json.dumps({"program": {"checkpoints": "out"}}))

    def attempt(self, code: int, *, steps: int | None, saved: int | None) -> str:
        """Let an attempt count steps, write a checkpoint and end; return what comes next."""
        self.begin()
        if steps is not None:
            heartbeats.beat(self.newest(), 0, steps, 0.1)
        if saved is not None:
            path = self.run / "out/nested/model.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.utime(path, (saved, saved))
        with mock.patch.dict(os.environ, self.environment()):
            attempts.write_outcome_of_program(self.run, code, "")
        return self.end(0 if code == 75 else code)[0]


@pytest.fixture
def theirs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Theirs:
    monkeypatch.setattr(attempt, "meeting_point", lambda **said: ("10.0.0.1", 23456))
    return Theirs(tmp_path / "run", capfd)


def test_exit_0_is_finished_75_goes_on_and_2_is_not_tried_again(theirs: Theirs) -> None:
    assert theirs.attempt(75, steps=5, saved=100) == "requeue"
    assert theirs.outcome(1)["outcome"] == "stopped"
    assert theirs.attempt(0, steps=3, saved=200) == "stop"
    assert (theirs.outcome(2)["outcome"], theirs.outcome(2)["step"]) == ("finished", 3)
    assert theirs.attempt(2, steps=None, saved=None) == "stop"
    assert theirs.outcome(3)["why"].startswith("the same input would fail again")


def test_a_failure_is_tried_again_as_long_as_there_is_progress(theirs: Theirs) -> None:
    for number in range(3):
        assert theirs.attempt(1, steps=5, saved=100 + number) == "requeue"
    assert theirs.attempt(1, steps=5, saved=200) == "stop"
    assert "4 attempts failed, and resources.max_restarts is 3" in theirs.outcome(4)["why"]


def test_a_script_that_saved_nothing_is_said_to_start_over(theirs: Theirs) -> None:
    assert theirs.attempt(75, steps=5, saved=None) == "requeue"
    assert theirs.outcome(1)["why"].startswith("starts over: it has saved nothing")
    assert theirs.attempt(75, steps=5, saved=100) == "requeue"
    assert theirs.outcome(2)["why"] == "continues from its last checkpoint"


@pytest.mark.parametrize(("steps", "newer"), [(5, 0), (0, 1)], ids=["no new file", "no step"])
def test_steps_alone_and_files_alone_are_no_progress(
    theirs: Theirs, steps: int, newer: int
) -> None:
    assert theirs.attempt(1, steps=5, saved=50) == "requeue"
    assert theirs.attempt(1, steps=steps, saved=50 + newer) == "requeue"
    assert theirs.attempt(1, steps=steps, saved=50 + 2 * newer) == "stop"
    said = theirs.outcome(3)["why"]
    assert said == "2 attempts in a row made no progress (no optimizer step and newer file in out)"


def test_what_takes_no_steps_of_torchs_is_known_by_its_checkpoints(theirs: Theirs) -> None:
    for number in range(6):
        assert theirs.attempt(75, steps=None, saved=100 + number) == "requeue"
