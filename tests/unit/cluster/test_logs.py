"""logs.py: following a run, and leaving it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import logs
from cluster.errors import UserError
from cluster.jobs import main
from tests.fake_slurm import FakeSlurm, attempt, replace, start, submit

NAME = "tinyllama/20260101-000000-abcdef"
RUNNING = "12 RUNNING None node[1-2]"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setattr(logs, "POLL_S", 0.02)
    monkeypatch.setattr(logs, "QUEUE_POLL_S", 0.04)
    monkeypatch.setattr(logs, "SILENT_POLL_S", 0.04)
    monkeypatch.setattr(logs, "GRACE_S", 0.4)
    monkeypatch.setattr(logs, "LAST_WORD_GRACE_S", 0.8)
    return FakeSlurm(tmp_path, monkeypatch)


def follow(
    capfdbinary: pytest.CaptureFixture[bytes],
    *arguments: str,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[int, str]:
    """Follow the run while another thread goes on with it."""
    failed: list[BaseException] = []

    def play() -> None:
        try:
            assert meanwhile is not None
            meanwhile()
        except BaseException as error:
            failed.append(error)

    player = threading.Thread(target=play) if meanwhile else None
    if player:
        player.start()
    code = main(["logs", f"--run={NAME}", *arguments])
    if player:
        player.join()
    assert not failed
    return code, capfdbinary.readouterr().out.decode()


def add(path: Path, text: str) -> None:
    with path.open("a") as stream:
        stream.write(text)


def test_a_run_that_is_over_is_shown_whole_and_no_slurm_is_needed(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME, 12)
    attempt(folder, 1, 12, outcome="stopped", step=340, why="time limit", next="requeue")
    path = attempt(folder, 2, 12, start=340, outcome="finished", step=1000, next="stop")
    (path / "batch.log").write_text("preflight: good\nfinished at step 1000\n")
    (path / "node-0.log").write_bytes(b"step 350 \xff\x1b[1m\nno end")
    slurm.set_silent(True)
    assert main(["logs", f"--run={NAME}"]) == 0
    assert capfdbinary.readouterr().out.splitlines() == [
        b"attempt 1: job 12 on node1 node2, stopped at step 340 (time limit)",
        b"---- attempt 2: job 12 on node1 node2, from step 340 ----",
        b"preflight: good",
        b"step 350 \xff\x1b[1m",
        b"no end",
        b"finished at step 1000",
        b"---- finished at step 1000; next: make generate RUN="
        + NAME.encode()
        + b' PROMPT="The cluster"',
    ]
    assert not slurm.asked("squeue")


@pytest.mark.parametrize(
    ("outcome", "state", "code", "words"),
    [
        ({"outcome": "finished", "next": "stop"}, "COMPLETED", 0, "make generate RUN="),
        ({"outcome": "stopped", "step": 9, "next": "stop"}, "COMPLETED", 75, "make submit RUN="),
        ({"outcome": "stopped", "step": 9, "next": "requeue"}, "", 75, "not in the queue"),
        (
            {"outcome": "failed", "next": "stop", "reason": "disk"},
            "FAILED",
            1,
            "(disk); log: ",
        ),
        ({"outcome": "unhealthy", "next": "stop"}, "COMPLETED", 1, "unhealthy"),
        ({"outcome": "cancelled", "next": "stop"}, "COMPLETED", 1, "make submit RUN="),
        ({}, "NODE_FAIL", 1, "a node failed"),
        ({}, "", 1, "lost"),
    ],
)
def test_the_exit_code_says_how_it_ended(
    slurm: FakeSlurm,
    capfdbinary: pytest.CaptureFixture[bytes],
    outcome: dict[str, object],
    state: str,
    code: int,
    words: str,
) -> None:
    attempt(slurm.run(NAME, 12), 1, 12, **outcome)
    slurm.set_queue(*([f"12 {state}"] if state else []))
    found, shown = follow(capfdbinary)
    assert found == code
    assert words in shown.splitlines()[-1]


def test_a_run_is_followed_through_the_queue_and_a_requeue(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "GRACE_S", 30.0)
    folder = slurm.run(NAME, 12)
    slurm.set_queue("12 PENDING Priority - 2031-01-01T10:05:00")

    def play() -> None:
        slurm.until_seen()
        slurm.set_queue("12 PENDING Resources - 2031-01-01T10:05:00")
        slurm.until_seen()
        slurm.set_queue(RUNNING)
        slurm.until_seen()
        (folder / "attempts/1").mkdir(parents=True)
        slurm.until_seen()
        path = attempt(folder, 1, 12)
        add(path / "batch.log", "preflight: good\n")
        slurm.until_seen()
        add(path / "node-0.log", "step 1\nstep")
        slurm.until_seen()
        add(path / "batch.log", "time limit is near\n")
        slurm.until_seen()
        add(path / "node-0.log", " 2\n")
        slurm.until_seen()
        attempt(folder, 1, 12, outcome="stopped", step=2, next="requeue")
        slurm.set_queue("12 COMPLETING None")
        slurm.until_seen()
        slurm.set_queue("12 PENDING BeginTime")
        slurm.until_seen()
        slurm.set_queue(RUNNING)
        path = attempt(folder, 2, 12, start=2)
        add(path / "node-0.log", "step 3\n")
        slurm.until_seen()
        attempt(folder, 2, 12, start=2, outcome="finished")
        slurm.set_queue("12 COMPLETED")

    code, shown = follow(capfdbinary, meanwhile=play)
    assert code == 0
    assert [line[:50] for line in shown.splitlines()] == [
        line[:50]
        for line in (
            "job 12 waits: others are before it in line; fewer NODES= or",
            "job 12 waits: the nodes that it wants are busy; it is next",
            "---- attempt 1: job 12 on node1 node2, from step 0 ----",
            "preflight: good",
            "step 1",
            "step",
            "time limit is near",
            " 2",
            "job 12 waits: its time has not come; a job that is queued",
            "---- attempt 2: job 12 on node1 node2, from step 2 ----",
            "step 3",
            f"---- finished; next: make generate RUN={NAME}",
        )
    ]


def test_a_file_that_is_late_or_shorter_for_a_while_is_waited_for(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME, 12)
    path = attempt(folder, 1, 12)
    slurm.set_queue(RUNNING)

    def play() -> None:
        slurm.until_seen()
        add(path / "node-1.log", "one\ntwo\n")
        slurm.until_seen()
        # What an NFS client may see of a file that another writes.
        replace(path / "node-1.log", "one\n")
        slurm.until_seen()
        replace(path / "node-1.log", "one\ntwo\nthree\n")
        attempt(folder, 1, 12, outcome="finished")
        slurm.set_queue("12 COMPLETED")

    code, shown = follow(capfdbinary, "--node=1", meanwhile=play)
    assert code == 0
    assert shown.splitlines()[1:4] == ["one", "two", "three"]


def test_words_that_arrive_after_the_end_are_shown(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "GRACE_S", 30.0)
    folder = slurm.run(NAME, 12)
    path = attempt(folder, 1, 12)
    slurm.set_queue("12 FAILED")

    def play() -> None:
        slurm.until_seen()
        add(path / "node-0.log", "error: no space left\n")
        slurm.until_seen()
        attempt(folder, 1, 12, outcome="failed", next="stop", why="full")

    code, shown = follow(capfdbinary, meanwhile=play)
    assert code == 1
    assert shown.splitlines()[1:2] == ["error: no space left"]
    assert "(full); log: runs/" in shown.splitlines()[-1]
    assert "attempts/1/node-0.log; make submit" in shown.splitlines()[-1]


def test_no_attempt_is_skipped_that_came_and_went_between_two_looks(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME, 12)
    slurm.set_queue(RUNNING)

    def play() -> None:
        slurm.until_seen()
        for number in (2, 3, 1):
            (folder / f"attempts/{number}").mkdir(parents=True)
        for number in (3, 2, 1):
            (attempt(folder, number, 12) / "node-0.log").write_text(f"line {number}\n")
        attempt(folder, 3, 12, outcome="finished")
        slurm.set_queue("12 COMPLETED")

    _, shown = follow(capfdbinary, meanwhile=play)
    assert [line for line in shown.splitlines() if line.startswith("line")] == [
        *("line 1", "line 2", "line 3")
    ]


def test_another_submission_of_the_run_is_followed_too(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME, 12)
    attempt(folder, 1, 12, outcome="failed", next="stop")
    submit(folder, 13)
    slurm.set_queue("13 PENDING Resources")

    def play() -> None:
        slurm.until_seen()
        attempt(folder, 2, 13, outcome="finished")
        slurm.set_queue("13 COMPLETED")

    code, shown = follow(capfdbinary, meanwhile=play)
    assert code == 0
    # The earlier attempt is the newest that there is, so it is shown whole.
    assert "job 13 waits" in shown and "attempt 2: job 13" in shown


def test_a_batch_script_that_died_before_its_first_attempt_shows_slurms_own_log(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME, 12)
    (folder / "slurm-12.log").write_text("slurmstepd: error: no such folder\n")
    slurm.set_queue("12 FAILED")
    code, shown = follow(capfdbinary)
    assert code == 1
    assert shown.startswith("slurmstepd: error")
    assert "slurm-12.log" in shown.splitlines()[-1]


def test_a_silent_controller_is_said_once_and_waited_for(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME, 12)
    path = attempt(folder, 1, 12)
    slurm.set_silent(True)

    def play() -> None:
        add(path / "node-0.log", "step 1\n")
        slurm.until_seen()
        slurm.until_seen()
        attempt(folder, 1, 12, outcome="finished")
        slurm.set_queue("12 COMPLETED")
        slurm.set_silent(False)

    player = threading.Thread(target=play)
    player.start()
    assert main(["logs", f"--run={NAME}"]) == 0
    player.join()
    captured = capfdbinary.readouterr()
    assert captured.err.count(b"note: the Slurm controller does not answer") == 1
    assert b"step 1" in captured.out


def test_a_job_that_slurm_queued_again_by_itself_is_followed_whatever_its_last_attempt_said(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME, 12)
    attempt(folder, 1, 12, outcome="stopped", step=340, next="stop")
    slurm.set_queue("12 PENDING BeginTime")

    def play() -> None:
        slurm.until_seen()
        attempt(folder, 2, 12, start=340, outcome="finished", step=1000)
        slurm.set_queue("12 COMPLETED")

    code, shown = follow(capfdbinary, meanwhile=play)
    assert code == 0
    assert "---- attempt 2" in shown


def test_where_no_slurm_is_a_settled_run_is_shown_and_another_refused(
    slurm: FakeSlurm,
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = slurm.run(NAME, 12)
    monkeypatch.delenv("SLUICE_CLUSTER_INSIDE")
    monkeypatch.setenv("SLUICE_CLUSTER", "nowhere")
    path = attempt(folder, 1, 12, outcome="stopped", step=340, next="stop")
    (path / "node-0.log").write_text("step 1\n")
    code, shown = follow(capfdbinary)
    assert code == 75
    assert "step 1" in shown
    attempt(folder, 1, 12, outcome="stopped", step=340)
    with pytest.raises(UserError, match="no private cluster"):
        main(["logs", f"--run={NAME}"])


def test_a_run_without_slurm_shows_its_logs(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME)
    (folder / "attempts/1").mkdir(parents=True)
    (folder / "attempts/1/node-0.log").write_text("step 1\n")
    code, shown = follow(capfdbinary)
    assert code == 0
    assert "without Slurm" in shown and "step 1" in shown


@pytest.mark.parametrize("node", ["2", "-1", "x", "9" * 30])
def test_a_node_that_the_run_has_not_is_refused(slurm: FakeSlurm, node: str) -> None:
    slurm.run(NAME, 12)
    with pytest.raises(UserError, match=f"^NODE={node}: "):
        main(["logs", f"--run={NAME}", f"--node={node}"])


@pytest.mark.parametrize("command", ["logs", "cancel"])
def test_without_a_run_it_says_where_to_find_one(slurm: FakeSlurm, command: str) -> None:
    with pytest.raises(UserError, match="make status"):
        main([command, "--run="])


# ---- a process of its own ----


@pytest.fixture
def followers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that end with the test."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def follow_outside(followers: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    process = start("logs", NAME)
    followers.append(process)
    return process


def test_ctrl_c_detaches_and_leaves_the_job_alone(
    slurm: FakeSlurm, followers: list[subprocess.Popen[bytes]]
) -> None:
    folder = slurm.run(NAME, 12)
    (attempt(folder, 1, 12) / "node-0.log").write_text("step 1\nstep 2")
    slurm.set_queue(RUNNING)
    process = follow_outside(followers)
    assert process.stdout is not None
    while process.stdout.readline() != b"step 1\n":
        pass
    time.sleep(1.2)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, b"")
    assert out.decode() == (f"step 2\ndetached; the job goes on. Come back: make logs RUN={NAME}\n")
    assert not slurm.asked("scancel")


def test_a_reader_that_left_ends_it_quietly(
    slurm: FakeSlurm, followers: list[subprocess.Popen[bytes]]
) -> None:
    folder = slurm.run(NAME, 12)
    path = attempt(folder, 1, 12)
    (path / "node-0.log").write_text("step 1\n")
    slurm.set_queue(RUNNING)
    process = follow_outside(followers)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    while process.poll() is None:
        add(path / "node-0.log", "step 2\n")
        time.sleep(0.1)
    assert process.wait(timeout=20) == 141
    assert process.stderr.read() == b""


def test_a_reader_that_left_is_missed_although_the_run_is_silent(
    slurm: FakeSlurm, followers: list[subprocess.Popen[bytes]]
) -> None:
    folder = slurm.run(NAME, 12)
    (attempt(folder, 1, 12) / "node-0.log").write_text("step 1\n")
    slurm.set_queue(RUNNING)
    process = follow_outside(followers)
    assert process.stdout is not None
    while process.stdout.readline() != b"step 1\n":
        pass
    process.stdout.close()
    assert process.wait(timeout=20) == 141
