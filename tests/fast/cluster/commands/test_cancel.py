"""cancel.py: a job is ended by its number, and saves before."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.commands import cancel
from runfolder.errors import UserError
from tests.fake_slurm import FakeSlurm, attempt, log_step, submit

NAME = "tinyllama/20260101-000000-abcdef"
RUNNING = "12 RUNNING None node[1-2]"
SITE = """[slurm]
partition = "gpu"
cpus_per_node = 4
gpus_per_node = 2
save_s = 60
[paths]
scratch = "/tmp"
"""
DENIED = "scancel: error: Kill job error: Access/permission denied"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path, monkeypatch)
    monkeypatch.setattr(cancel, "time", fake.clock)
    (tmp_path / "site.toml").write_text(SITE)
    return fake


def run_cancel() -> int:
    return main(["cancel", f"--run={NAME}"])


@pytest.mark.parametrize("state", ["PENDING", "CONFIGURING", "SUSPENDED", "REQUEUE_HOLD"])
def test_a_job_with_nothing_to_save_is_ended_at_once(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    folder = slurm.run(NAME, 11, 12)
    slurm.set_queue(f"12 {state} Resources", "11 RUNNING")
    seen: list[object] = []

    def end(arguments: str) -> None:
        seen.append(json.loads((folder / "cancel.json").read_text()))
        slurm.set_queue("12 CANCELLED")

    slurm.on_scancel = end
    assert run_cancel() == 0
    assert slurm.asked("scancel") == ["12"]
    # A start in that moment would have found the request.
    assert seen == [{"job_id": 12}]
    assert not (folder / "cancel.json").exists()
    assert f"make submit RUN={NAME}" in capsys.readouterr().out


def test_a_running_job_saves_first(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    folder = slurm.run(NAME, 12)
    attempt(folder, 1, 12)
    slurm.set_queue(RUNNING)

    def save() -> Iterator[None]:
        assert slurm.asked("scancel") and (folder / "cancel.json").exists()
        slurm.set_queue("12 COMPLETING")
        yield
        (folder / "checkpoints/step-00000340").mkdir(parents=True)
        attempt(folder, 1, 12, outcome="stopped", step=340, next="stop")
        slurm.set_queue("12 COMPLETED")

    slurm.meanwhile(save)
    assert run_cancel() == 0 and slurm.is_played
    assert slurm.asked("scancel") == ["--signal=USR1 --batch 12"]
    assert not (folder / "cancel.json").exists()
    assert capsys.readouterr().out.splitlines() == [
        "job 12 was asked to save and end; it has 60 s",
        "job 12 is ending",
        f"job 12 is cancelled; continue with make submit RUN={NAME} (checkpoint step-00000340)",
    ]


def test_a_save_that_takes_too_long_is_ended_and_the_checkpoint_named(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = slurm.run(NAME, 12)
    (folder / "checkpoints/step-00000300").mkdir(parents=True)
    slurm.set_queue(RUNNING)
    told_at: list[float] = []

    def note(arguments: str) -> None:
        told_at.append(slurm.clock.now)
        if arguments == "12":
            slurm.set_queue("12 CANCELLED")

    slurm.on_scancel = note
    assert run_cancel() == 0
    assert slurm.asked("scancel") == ["--signal=USR1 --batch 12", "12"]
    # All of its time, and no more than another look.
    assert 60 <= told_at[1] - told_at[0] <= 60 + 2 * cancel.POLL_S
    shown = capsys.readouterr().out
    assert "did not save within 60 s" in shown
    assert "did not finish saving in time" in shown and "checkpoint step-00000300" in shown


def test_a_job_that_slurm_cannot_end_is_said(slurm: FakeSlurm) -> None:
    slurm.run(NAME, 12)
    slurm.set_queue(RUNNING)
    with pytest.raises(UserError, match=r"still in the queue after 120 s; job 12 was told to end"):
        run_cancel()
    assert slurm.asked("scancel") == ["--signal=USR1 --batch 12", "12"]


def test_a_job_that_is_queued_again_meanwhile_is_ended_all_the_same(slurm: FakeSlurm) -> None:
    slurm.run(NAME, 12)
    slurm.set_queue(RUNNING)
    slurm.on_scancel = lambda arguments: slurm.set_queue(
        "12 CANCELLED" if arguments == "12" else "12 PENDING BeginTime"
    )
    assert run_cancel() == 0
    assert slurm.asked("scancel") == ["--signal=USR1 --batch 12", "12"]


def test_a_job_that_finishes_first_is_said_to_have(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(slurm.run(NAME, 12), 1, 12, outcome="finished", step=1000)
    slurm.set_queue(RUNNING)

    def forget(arguments: str) -> str:
        # Between the look and the signal it ended.
        slurm.set_queue()
        return "scancel: error: Kill job error on job id 12: Invalid job id specified"

    slurm.on_scancel = forget
    assert run_cancel() == 0
    assert "had already finished" in capsys.readouterr().out


@pytest.mark.parametrize("queue", [[], ["12 COMPLETED"], ["12 TIMEOUT"]])
def test_a_job_that_is_over_is_refused(slurm: FakeSlurm, queue: list[str]) -> None:
    attempt(slurm.run(NAME, 12), 1, 12, outcome="finished", step=1000)
    slurm.set_queue(*queue)
    with pytest.raises(UserError, match=r"job 12 is no longer in the queue \(finished at step"):
        run_cancel()
    assert not slurm.asked("scancel")


def test_a_number_that_is_now_another_runs_is_left_alone(slurm: FakeSlurm) -> None:
    slurm.run(NAME, 12)
    submit(slurm.run("imdb/1"), 12, "2026-02-01T00:00:00+0000")
    slurm.set_queue(RUNNING)
    with pytest.raises(UserError, match="no longer in the queue"):
        run_cancel()
    assert not slurm.asked("scancel")


def test_a_run_that_was_not_submitted_or_whose_record_is_damaged_is_refused(
    slurm: FakeSlurm,
) -> None:
    folder = slurm.run(NAME)
    with pytest.raises(UserError, match="not submitted"):
        run_cancel()
    submit(folder, 12)
    with (folder / "jobs.jsonl").open("a") as stream:
        stream.write('{"job_id": 1')
    slurm.set_queue(RUNNING)
    with pytest.raises(UserError, match="damaged"):
        run_cancel()
    assert not slurm.asked("scancel")


@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_a_refusal_takes_the_request_back(slurm: FakeSlurm, state: str) -> None:
    folder = slurm.run(NAME, 12)
    slurm.set_queue(f"12 {state}")
    slurm.on_scancel = lambda arguments: DENIED
    with pytest.raises(UserError, match="permission denied"):
        run_cancel()
    assert not (folder / "cancel.json").exists()


def test_a_refusal_leaves_the_request_of_another_cancel(slurm: FakeSlurm) -> None:
    folder = slurm.run(NAME, 12)
    (folder / "cancel.json").write_text('{"job_id": 12}')
    slurm.set_queue(RUNNING)
    slurm.on_scancel = lambda arguments: DENIED
    with pytest.raises(UserError):
        run_cancel()
    assert (folder / "cancel.json").exists()


def test_a_controller_that_is_silent_before_the_request_is_one_line(slurm: FakeSlurm) -> None:
    folder = slurm.run(NAME, 12)
    slurm.is_silent = True
    with pytest.raises(UserError, match="does not answer"):
        run_cancel()
    assert not (folder / "cancel.json").exists()


def test_a_controller_that_falls_silent_after_the_request_is_waited_for(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = slurm.run(NAME, 12)
    slurm.set_queue(RUNNING)

    def come_back() -> Iterator[None]:
        slurm.is_silent = True
        yield
        assert (folder / "cancel.json").exists()
        slurm.set_queue("12 COMPLETED")
        slurm.is_silent = False

    slurm.meanwhile(come_back)
    assert run_cancel() == 0 and slurm.is_played
    assert "does not answer at the moment" in capsys.readouterr().out


def test_two_cancels_at_once_are_harmless(slurm: FakeSlurm) -> None:
    folder = slurm.run(NAME, 12)
    slurm.set_queue(RUNNING)
    codes: list[int] = []

    def cancel_too() -> None:
        slurm.meanwhile(lambda: slurm.set_queue("12 COMPLETED"))
        # It ends first, and takes the request with it.
        codes.append(run_cancel())

    slurm.meanwhile(cancel_too)
    codes.append(run_cancel())
    assert codes == [0, 0]
    assert slurm.asked("scancel") == ["--signal=USR1 --batch 12"] * 2
    assert not (folder / "cancel.json").exists()
    assert not list(folder.glob(".cancel*"))


def test_ctrl_c_lets_the_request_stand(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = slurm.run(NAME, 12)
    slurm.set_queue(RUNNING)

    slurm.meanwhile(lambda: signal.raise_signal(signal.SIGINT))
    assert run_cancel() == 130
    asked, told = capsys.readouterr().out.split("\n\n")
    assert asked == "job 12 was asked to save and end; it has 60 s"
    assert "job 12 was told to end: make status" in told
    assert (folder / "cancel.json").exists()


def test_ctrl_c_while_a_sweep_ends_leaves_its_other_runs_alone(slurm: FakeSlurm) -> None:
    for job_id in (12, 13):
        folder = slurm.run(f"tinyllama/20260101-0000{job_id}-abcdef-study", job_id)
        (folder / "run.json").write_text(json.dumps({"sweep": {"name": "study"}}))
    slurm.set_queue("12 RUNNING", "13 RUNNING")

    slurm.meanwhile(lambda: signal.raise_signal(signal.SIGINT))
    assert main(["cancel", "--name=study"]) == 130
    # The newest first, since it may be waiting for the others.
    assert slurm.asked("scancel") == ["--signal=USR1 --batch 13"]


def test_what_a_suspended_job_loses_is_said(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = slurm.run(NAME, 12)
    attempt(folder, 1, 12)
    (folder / "checkpoints/step-00000300").mkdir(parents=True)
    log_step(folder, 340)
    slurm.set_queue("12 SUSPENDED None node[1-2]")
    slurm.on_scancel = lambda arguments: slurm.set_queue("12 CANCELLED")
    assert run_cancel() == 0
    assert slurm.asked("scancel") == ["12"]
    shown = capsys.readouterr().out
    assert "is suspended and cannot save" in shown
    assert "(checkpoint step-00000300; 40 steps are lost)" in shown
