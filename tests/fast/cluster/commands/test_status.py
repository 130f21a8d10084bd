"""status.py: the table of runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.__main__ import main
from runfolder.errors import UserError
from tests.fake_slurm import FakeSlurm, attempt, log_step, make_old, submit
from tests.shared import CHECKOUT

NAME = "tinyllama/20260101-000000-abcdef"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path, monkeypatch)


def status(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["status", *arguments]) == 0
    return capsys.readouterr().out


def only(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    content = json.loads(status(capsys, "--format=json", *arguments))
    assert content["version"] == 1
    (row,) = content["runs"]
    assert isinstance(row, dict)
    return row


def test_without_runs_it_says_what_to_do_and_asks_nobody(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "make submit" in status(capsys)
    assert json.loads(status(capsys, "--format=json")) == {"version": 1, "runs": [], "older": 0}
    assert not slurm.asked("squeue")


# The table's, the configuration's and the connection's: half a second of a login node's processor.
HEAVY = {"rich", "yaml", "paramiko"}


def test_without_runs_no_library_is_waited_for(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    script = "import sys; from cluster.__main__ import main; main(['status']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=clean_environment | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "make submit" in done.stdout
    assert not HEAVY & set(done.stdout.split())


def test_a_waiting_run_says_why_and_until_when(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.run(NAME, 12)
    slurm.set_queue("12 PENDING Resources - 2031-01-01T10:05:00")
    row = only(capsys)
    assert (row["state"], row["slurm_state"], row["reason"]) == ("waiting", "PENDING", "Resources")
    assert row["note"] == (
        "the nodes that it needs are busy; it is next in the queue; expected start 2031-01-01 10:05"
    )
    assert (row["run"], row["step"], row["max_steps"]) == (NAME, 0, 1000)


def test_a_requeued_run_is_queued_again(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(slurm.run(NAME, 12), 1, 12, outcome="stopped", step=340, next="requeue")
    slurm.set_queue("12 PENDING BeginTime")
    row = only(capsys)
    assert (row["state"], row["attempts"], row["step"]) == ("queued again", 1, 340)
    assert "two minutes" in str(row["note"])


def test_a_run_that_counts_rows_says_what_it_needs_too(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = slurm.run(NAME, 12)
    attempt(folder, 1, 12)
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in (330, 340):
            line = {"step": step, "rows": 16 * step, "rows_per_second": 8.0}
            stream.write(json.dumps(line) + "\n")
    slurm.set_queue("12 RUNNING None node[1-2] 2031-01-01T10:05:00 0:40:00")
    # 660 steps of 16 rows.
    assert only(capsys)["needed_s"] == pytest.approx(1320)


def test_a_running_run_says_whether_its_time_is_enough(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = slurm.run(NAME, 12)
    attempt(folder, 1, 12)
    log_step(folder, 330, rate=50.0)
    log_step(folder, 340, rate=50.0)
    slurm.set_queue("12 RUNNING None node[1-2] 2031-01-01T10:05:00 0:40:00")
    row = only(capsys)
    assert (row["state"], row["nodes"], row["time_left_s"]) == ("running", "node[1-2]", 2400)
    # 660 steps of 500 tokens.
    assert row["needed_s"] == pytest.approx(6600)
    assert row["note"] == "needs 1:50:00, 0:40:00 left: will be requeued automatically"
    # A plugin of the site may forbid that.
    record = json.loads((folder / "attempts/1/slurm.json").read_text()) | {"requeues": False}
    (folder / "attempts/1/slurm.json").write_text(json.dumps(record))
    assert "Requeue=0" in str(only(capsys)["note"])
    slurm.set_queue("12 RUNNING None node[1-2] 2031-01-01T10:05:00 1-00:00:00")
    assert only(capsys)["note"] == "needs 1:50:00, 1-00:00:00 left"
    slurm.set_queue("12 RUNNING None node[1-2] 2031-01-01T10:05:00 INVALID")
    assert only(capsys)["time_left_s"] is None


@pytest.mark.parametrize("width", ["80", "200"])
def test_the_table_is_readable_at_any_width_and_never_cuts_a_name(
    slurm: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: str,
) -> None:
    folder = slurm.run(NAME, 12)
    attempt(folder, 1, 12)
    log_step(folder, 340, rate=50.0)
    slurm.run(NAME + "-2", 1234567)
    slurm.set_queue("12 RUNNING None node[1-2] 2031-01-01T10:05:00 0:40:00", "1234567 PENDING Foo")
    monkeypatch.setenv("COLUMNS", width)
    shown = status(capsys)
    assert max(map(len, shown.splitlines())) <= int(width)
    for words in (NAME, NAME + "-2", "1234567", "340/1000", "node[1-2]", "Foo"):
        assert words in shown
    assert "\x1b" not in shown and "\u2026" not in shown
    slurm.run("tinyllama/20260101-000001-abcdef-" + "x" * 60, 13)
    assert "x" * 60 in status(capsys)


def test_into_a_pipe_goes_a_line_for_each_run(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        slurm.run(f"{NAME}-{number}", 12 + number)
    slurm.set_queue(*(f"{12 + number} PENDING PartitionTimeLimit" for number in range(3)))
    assert len(status(capsys).splitlines()) == 4


@pytest.mark.parametrize(
    ("outcome", "state", "next_step"),
    [
        ({"outcome": "finished", "step": 1000, "next": "stop"}, "finished", "make generate"),
        ({"outcome": "failed", "next": "stop", "why": "disk full"}, "failed", "make logs"),
        ({"outcome": "cancelled", "next": "stop"}, "cancelled", "make submit"),
        ({}, "lost", "make submit"),
    ],
)
def test_a_run_that_is_over_says_how_and_what_next(
    slurm: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
    outcome: dict[str, object],
    state: str,
    next_step: str,
) -> None:
    attempt(slurm.run(NAME, 12), 1, 12, **outcome)
    row = only(capsys)
    assert row["state"] == state
    assert f"{next_step} RUN={NAME}" in str(row["note"])
    # What is over for certain needs no Slurm.
    assert len(slurm.asked("squeue")) == (state not in ("finished", "cancelled"))


def test_a_job_that_slurm_queued_again_by_itself_waits_whatever_its_last_attempt_said(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(slurm.run(NAME, 12), 1, 12, outcome="stopped", step=340, next="stop")
    slurm.set_queue("12 PENDING BeginTime")
    assert only(capsys)["state"] == "queued again"


def test_runs_that_ended_long_ago_are_only_counted(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        folder = slurm.run(f"{NAME}-{number}", 12 + number)
        attempt(folder, 1, 12 + number, outcome="finished", step=1000)
        make_old(folder)
    waiting = slurm.run("imdb/20260101-000000-abcdef", 20)
    make_old(waiting)
    slurm.set_queue("20 PENDING Priority")
    shown = status(capsys)
    assert "imdb/" in shown and NAME not in shown
    assert "3 older runs not shown" in shown
    assert only(capsys, f"--run={NAME}-1")["state"] == "finished"


def test_one_squeue_call_serves_all_runs(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        slurm.run(f"{NAME}-{number}", 12 + number)
    status(capsys)
    assert len(slurm.asked("squeue")) == 1


def test_a_number_that_a_new_cluster_gave_again_is_the_newer_runs(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(slurm.run("imdb/1"), 12, "2026-01-01T00:00:00+0000")
    submit(slurm.run("imdb/2"), 12, "2026-02-01T00:00:00+0000")
    slurm.set_queue("12 RUNNING None node1")
    states = {
        row["run"]: row["state"] for row in json.loads(status(capsys, "--format=json"))["runs"]
    }
    assert states == {"imdb/1": "lost", "imdb/2": "running"}
    assert only(capsys, "--run=imdb/1")["state"] == "lost"
    assert only(capsys, "--run=imdb/2")["state"] == "running"


def test_damaged_files_show_as_question_marks(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = slurm.run(NAME, 12)
    path = attempt(folder, 1, 12)
    for file in ("config.yaml", "metrics.jsonl"):
        (folder / file).write_bytes(b"\xff{[\n")
    (path / "slurm.json").write_text("{")
    (path / "outcome.json").write_text("[]")
    shown = status(capsys)
    assert "?/?" in shown and "outcome.json is damaged" in shown


def test_escape_sequences_do_not_reach_the_terminal(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    path = attempt(slurm.run("tiny\x1b[2Jllama/20260101", 12), 1, 12)
    (path / "outcome.json").write_text(
        json.dumps({"outcome": "failed", "next": "stop", "why": "\x1b]0;title\x07\nfoo"})
    )
    slurm.run("imdb/1", 13)
    slurm.set_queue("13 PENDING \x1b[31mRed [bold]")
    for arguments in ([], ["--format=json"]):
        shown = status(capsys, *arguments)
        assert "\x1b" not in shown and "\x07" not in shown
    assert "title" in shown


def test_a_silent_controller_is_one_line(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.run(NAME, 12)
    slurm.is_silent = True
    with pytest.raises(UserError, match="controller does not answer"):
        main(["status"])
    assert capsys.readouterr().out == ""


def test_a_run_that_was_not_submitted_is_refused(slurm: FakeSlurm) -> None:
    slurm.run(NAME)
    with pytest.raises(UserError, match=r"never submitted.*make submit RUN="):
        main(["status", f"--run={NAME}"])


def test_an_unknown_command_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^'stats' is not a command; did you mean 'status'\?$"):
        main(["stats"])


def test_a_held_job_is_released_on_the_cluster_that_has_it(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = slurm.run(NAME)
    submit(folder, 12, cluster="far")
    slurm.set_queue("12 PENDING JobHeldUser", cluster="far")
    assert "scontrol --clusters=far release 12" in str(only(capsys)["note"])
    submit(folder, 13, cluster="here")
    slurm.set_queue("13 PENDING JobHeldUser")
    assert "scontrol release 13" in str(only(capsys)["note"])
