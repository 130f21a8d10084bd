"""logs.py: following a run, and leaving it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.commands import logs, newest_job
from runfolder.errors import UserError
from tests.fake_slurm import FakeSlurm, attempt, submit
from tests.shared import CHECKOUT

NAME = "tinyllama/20260101-000000-abcdef"
RUNNING = "12 RUNNING None node[1-2]"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path, monkeypatch)
    monkeypatch.setattr(logs, "time", fake.clock)
    monkeypatch.setattr(newest_job, "time", fake.clock)
    return fake


def follow(capfdbinary: pytest.CaptureFixture[bytes], *arguments: str) -> tuple[int, str]:
    """Follow the run; return the exit code and what was shown."""
    code = main(["logs", f"--run={NAME}", *arguments])
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
    slurm.is_silent = True
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
    path = attempt(slurm.run(NAME, 12), 1, 12, **outcome)
    (path / "node-0.log").write_text("")
    slurm.set_queue(*([f"12 {state}"] if state else []))
    found, shown = follow(capfdbinary)
    assert found == code
    assert words in shown.splitlines()[-1]


def test_a_run_is_followed_through_the_queue_and_a_requeue(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME, 12)
    slurm.set_queue("12 PENDING Priority - 2031-01-01T10:05:00")

    def play() -> Iterator[None]:
        slurm.set_queue("12 PENDING Resources - 2031-01-01T10:05:00")
        yield
        slurm.set_queue(RUNNING)
        yield
        (folder / "attempts/1").mkdir(parents=True)
        yield
        path = attempt(folder, 1, 12)
        add(path / "batch.log", "preflight: good\n")
        yield
        add(path / "node-0.log", "step 1\nstep")
        yield
        add(path / "batch.log", "time limit is near\n")
        yield
        add(path / "node-0.log", " 2\n")
        yield
        attempt(folder, 1, 12, outcome="stopped", step=2, next="requeue")
        slurm.set_queue("12 COMPLETING None")
        yield
        slurm.set_queue("12 PENDING BeginTime")
        yield
        slurm.set_queue(RUNNING)
        path = attempt(folder, 2, 12, start=2)
        add(path / "node-0.log", "step 3\n")
        yield
        attempt(folder, 2, 12, start=2, outcome="finished")
        slurm.set_queue("12 COMPLETED")

    slurm.meanwhile(play)
    code, shown = follow(capfdbinary)
    assert slurm.is_played and code == 0
    assert [line[:50] for line in shown.splitlines()] == [
        line[:50]
        for line in (
            "job 12 waits: other jobs are ahead of it in the queue; with",
            "job 12 waits: the nodes that it needs are busy; it is next",
            "---- attempt 1: job 12 on node1 node2, from step 0 ----",
            "preflight: good",
            "step 1",
            "step",
            "time limit is near",
            " 2",
            "job 12 waits: waits for its begin time; after a requeue",
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

    def play() -> Iterator[None]:
        add(path / "node-1.log", "one\ntwo\n")
        yield
        # What an NFS client may see of a file that another writes.
        (path / "node-1.log").write_text("one\n")
        yield
        (path / "node-1.log").write_text("one\ntwo\nthree\n")
        attempt(folder, 1, 12, outcome="finished")
        slurm.set_queue("12 COMPLETED")

    slurm.meanwhile(play)
    code, shown = follow(capfdbinary, "--node=1")
    assert slurm.is_played and code == 0
    assert shown.splitlines()[1:4] == ["one", "two", "three"]


def test_words_that_arrive_after_the_end_are_shown(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME, 12)
    path = attempt(folder, 1, 12)
    slurm.set_queue("12 FAILED")

    def play() -> Iterator[None]:
        add(path / "node-0.log", "error: no space left\n")
        yield
        attempt(folder, 1, 12, outcome="failed", next="stop", why="full")

    slurm.meanwhile(play)
    code, shown = follow(capfdbinary)
    assert slurm.is_played and code == 1
    assert shown.splitlines()[1:2] == ["error: no space left"]
    assert "(full); log: runs/" in shown.splitlines()[-1]
    assert "attempts/1/node-0.log; make submit" in shown.splitlines()[-1]


def test_last_words_that_do_not_come_are_waited_for_as_long_as_nfs_may_take(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    attempt(slurm.run(NAME, 12), 1, 12)
    slurm.set_queue("12 NODE_FAIL")
    assert follow(capfdbinary)[0] == 1
    assert (
        newest_job.LAST_WORD_GRACE_S
        <= slurm.clock.now
        <= newest_job.LAST_WORD_GRACE_S + 2 * logs.POLL_S
    )


def test_no_attempt_is_skipped_that_came_and_went_between_two_looks(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME, 12)
    slurm.set_queue(RUNNING)

    def play() -> None:
        for number in (2, 3, 1):
            (folder / f"attempts/{number}").mkdir(parents=True)
        for number in (3, 2, 1):
            (attempt(folder, number, 12) / "node-0.log").write_text(f"line {number}\n")
        attempt(folder, 3, 12, outcome="finished")
        slurm.set_queue("12 COMPLETED")

    slurm.meanwhile(play)
    _, shown = follow(capfdbinary)
    assert slurm.is_played
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

    def play() -> Iterator[None]:
        yield
        attempt(folder, 2, 13, outcome="finished")
        slurm.set_queue("13 COMPLETED")

    slurm.meanwhile(play)
    code, shown = follow(capfdbinary)
    assert slurm.is_played and code == 0
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
    slurm.is_silent = True

    def play() -> Iterator[None]:
        add(path / "node-0.log", "step 1\n")
        yield
        yield
        attempt(folder, 1, 12, outcome="finished")
        slurm.set_queue("12 COMPLETED")
        slurm.is_silent = False

    slurm.meanwhile(play)
    assert main(["logs", f"--run={NAME}"]) == 0 and slurm.is_played
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
        attempt(folder, 2, 12, start=340, outcome="finished", step=1000)
        slurm.set_queue("12 COMPLETED")

    slurm.meanwhile(play)
    code, shown = follow(capfdbinary)
    assert slurm.is_played and code == 0
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


# ---- leaving it ----


def test_ctrl_c_detaches_and_leaves_the_job_alone(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME, 12)
    (attempt(folder, 1, 12) / "node-0.log").write_text("step 1\nstep 2")
    slurm.set_queue(RUNNING)

    def interrupt() -> Iterator[None]:
        yield
        signal.raise_signal(signal.SIGINT)

    slurm.meanwhile(interrupt)
    code, shown = follow(capfdbinary)
    assert slurm.is_played and code == 0
    assert shown.splitlines()[1:] == [
        *(
            "step 1",
            "step 2",
            f"detached; the job continues. To follow it again: make logs RUN={NAME}",
        )
    ]
    assert not slurm.asked("scancel")


@contextmanager
def into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Have standard output go into a pipe; yields its other end, which the test closes."""
    reading, writing = os.pipe()
    output = io.TextIOWrapper(os.fdopen(writing, "wb"))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", output)
        yield reading
    # What found no reader would be written once more.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, writing)
    os.close(null)
    output.close()


@pytest.mark.parametrize("more", ["", "step 2\n"], ids=["silent", "busy"])
def test_a_reader_that_left_ends_it_also_while_the_run_is_silent(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    folder = slurm.run(NAME, 12)
    log = attempt(folder, 1, 12) / "node-0.log"
    log.write_text("step 1\n")
    slurm.set_queue(RUNNING)

    with into_a_pipe(monkeypatch) as reader:

        def leave() -> None:
            assert os.read(reader, 1000).endswith(b"step 1\n")
            os.close(reader)
            add(log, more)

        slurm.meanwhile(leave)
        with pytest.raises(BrokenPipeError):
            main(["logs", f"--run={NAME}"])
    assert slurm.is_played


def test_without_a_reader_it_ends_quietly(
    slurm: FakeSlurm, tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    path = attempt(slurm.run(NAME, 12), 1, 12, outcome="finished")
    (path / "node-0.log").write_text("step 1\n")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "logs", "--run", NAME],
        cwd=tmp_path,
        env=clean_environment | {"PYTHONPATH": str(CHECKOUT), "SLUICE_RUNS": str(slurm.runs)},
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_log_that_is_not_there_is_not_named_as_one_to_read(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = slurm.run(NAME, 12)
    slurm.set_queue("12 FAILED JobLaunchFailure node1")
    code, shown = follow(capfdbinary)
    assert code == 1
    assert f"cannot open {folder}/slurm-12.log" in shown.splitlines()[-1]
    assert "; log: " not in shown
