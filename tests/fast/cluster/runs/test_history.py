"""history.py: what a run folder tells, also a damaged one."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.runs import history
from cluster.runs.progress import read_progress
from cluster.slurm.call import QueuedJob
from runfolder import attempts, checkpoints, files, records
from tests import fake_slurm

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
keys = ["job_id", "submitted", "num_nodes", "nodes", "step", "outcome", "next", "why", "reason"]
keys += ["tokens", "tokens_per_second", "max_steps"]
entries = st.dictionaries(st.sampled_from(keys), values | st.integers(0, 10**6))
damaged = entries.map(lambda record: json.dumps(record).encode()) | st.binary()
cut = st.tuples(damaged, st.integers(0, 200)).map(lambda pair: pair[0][: pair[1]])
contents = st.lists(damaged | cut, max_size=4).map(b"\n".join)


def queued(state: str, job_id: int = 7) -> QueuedJob:
    return QueuedJob(
        job_id=job_id,
        state=state,
        folder="",
        reason="",
        nodes="",
        start="",
        time_left="",
    )


def test_a_runs_job_is_its_own_by_whichever_path_the_run_is_named(tmp_path: Path) -> None:
    folder, link = tmp_path / "run", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    job = replace(queued("RUNNING"), folder=str(folder))
    for name in (folder, link, tmp_path / "run/../run"):
        assert history.job_of(name, 7, {7: job}) == job
    assert history.job_of(tmp_path / "other", 7, {7: job}) is None


@given(jobs=contents, metrics=contents, config=contents, slurm=cut, outcome=cut, state=st.text())
@example(b"", b"", b"", b"{}", b"", "\x1b")
@settings(max_examples=40)
def test_damaged_files_count_as_unknown(
    jobs: bytes, metrics: bytes, config: bytes, slurm: bytes, outcome: bytes, state: str
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "attempts/1").mkdir(parents=True)
        (folder / "jobs.jsonl").write_bytes(jobs)
        (folder / "metrics.jsonl").write_bytes(metrics)
        (folder / "config.yaml").write_bytes(config)
        (folder / "attempts/1/slurm.json").write_bytes(slurm)
        (folder / "attempts/1/outcome.json").write_bytes(outcome)
        made = attempts.read_all(folder)
        came = read_progress(folder, made[-1])
        assert came.needed_s is None or came.needed_s >= 0
        records.has_damaged_end(folder)
        last = records.Submission(job_id=7, submitted="", num_nodes=None)
        for submission in [last, *records.submissions(folder)]:
            history.is_final(submission, made)
            for job in (None, queued(state), queued("CANCELLED")):
                end = history.ending(folder, submission, made, job)
                assert end.word in (*attempts.OUTCOMES, "?")
                assert (end.word + end.why).isprintable()
        assert all(node.isprintable() for node in made[-1].nodes)


@given(st.text() | st.text(alphabet=string.printable + "\x1b\x9b\u202e\ud800"))
def test_no_control_character_reaches_a_terminal(words: str) -> None:
    shown = files.text(words)
    assert shown.isprintable()
    shown.encode()


def test_half_a_line_is_no_submission(tmp_path: Path) -> None:
    fake_slurm.submit(tmp_path, 12)
    assert not records.has_damaged_end(tmp_path)
    with (tmp_path / "jobs.jsonl").open("a") as stream:
        stream.write('{"job_id": 1')
    assert [found.job_id for found in records.submissions(tmp_path)] == [12]
    assert records.has_damaged_end(tmp_path)


def test_progress_is_the_newest_line_of_a_long_record(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("max_steps: 20000\nother: !!float abc\n")
    padding = json.dumps({"step": 1, "loss": 1.0, "tokens": 10}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(padding * 20_000)
    fake_slurm.log_step(tmp_path, 9990, 100.0)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 10000, "loss": 1.0, "tokens": 5000000}\n{"step": 100')
    came = read_progress(tmp_path, None)
    assert (came.step, came.max_steps, came.tokens_per_second) == (10_000, 20_000, 100.0)
    # 500 tokens a step, 10,000 steps to go.
    assert came.needed_s == pytest.approx(50_000)


def test_progress_without_a_record_is_the_newest_checkpoint_or_outcome(tmp_path: Path) -> None:
    assert read_progress(tmp_path, None).step == 0
    (tmp_path / "checkpoints/step-00000100").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000900.damaged").mkdir()
    assert checkpoints.newest_step(tmp_path) == 100
    assert read_progress(tmp_path, None).step == 100
    fake_slurm.attempt(tmp_path, 1, 12, outcome="stopped", step=110)
    assert read_progress(tmp_path, attempts.read(tmp_path, 1)).step == 110


def test_a_damaged_record_alone_is_an_unknown_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{{{\n")
    assert read_progress(tmp_path, None).step is None


@pytest.mark.parametrize(
    ("state", "outcome", "word"),
    [
        ("", {"outcome": "finished", "step": 9}, "finished"),
        ("COMPLETED", {"outcome": "failed", "next": "stop"}, "failed"),
        ("", {"outcome": "stopped", "next": "requeue"}, "stopped"),
        ("CANCELLED", {"outcome": "stopped", "next": "requeue"}, "cancelled"),
        ("", {"outcome": 7}, "?"),
        ("CANCELLED", {}, "cancelled"),
        ("NODE_FAIL", {}, "failed"),
        ("OUT_OF_MEMORY", {}, "failed"),
        ("COMPLETED", {}, "lost"),
        ("", {}, "lost"),
    ],
)
def test_the_attempt_tells_how_a_job_ended_and_slurm_only_without_it(
    tmp_path: Path, state: str, outcome: dict[str, object], word: str
) -> None:
    last = records.Submission(job_id=7, submitted="", num_nodes=1)
    fake_slurm.attempt(tmp_path, 1, 7, **outcome)
    job = queued(state) if state else None
    assert history.ending(tmp_path, last, attempts.read_all(tmp_path), job).word == word


def test_an_earlier_jobs_outcome_is_not_a_later_ones(tmp_path: Path) -> None:
    last = records.Submission(job_id=8, submitted="", num_nodes=1)
    fake_slurm.attempt(tmp_path, 1, 7, outcome="finished", step=9)
    made = attempts.read_all(tmp_path)
    assert not history.is_final(last, made)
    assert history.ending(tmp_path, last, made, None).word == "lost"
    assert history.ending(tmp_path, last, made, queued("CANCELLED", 8)).why == "before it started"
