"""clusters.py: runs on several clusters of one accounting, and what their queues have forgotten."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.commands import cancel
from cluster.runs import clusters, history
from cluster.site.settings import PRIVATE
from runfolder.errors import UserError
from tests.fake_slurm import FakeSlurm, attempt, make_old, submit

HERE = "tinyllama/20260101-000000-aaaaaa"
THERE = "tinyllama/20260102-000000-bbbbbb"
OTHER = "tinyllama/20260103-000000-cccccc"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path, monkeypatch)


def states(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert main(["status", "--format=json", *words]) == 0
    return {row["run"]: row["state"] for row in json.loads(capsys.readouterr().out)["runs"]}


def test_each_run_is_looked_for_on_its_own_cluster(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The module of a third is loaded by now.
    monkeypatch.setenv("SLURM_CLUSTERS", "third")
    for name, cluster in ((HERE, "here"), (THERE, "there"), (OTHER, "")):
        submit(slurm.run(name), 12, cluster=cluster)
    slurm.set_queue("12 RUNNING")
    slurm.set_queue("12 PENDING Priority", cluster="there")
    folders = {name: slurm.runs / name for name in (HERE, THERE)}
    for name, folder in folders.items():
        monkeypatch.setattr(slurm, "_folder_of", lambda _, folder=folder: str(folder))
        assert (
            states(capsys, f"--run={name}")
            == {
                HERE: {HERE: "running"},
                THERE: {THERE: "waiting"},
            }[name]
        )
    asked = [words.split(" ")[0] for words in slurm.asked("squeue")]
    # The one at hand not by its name, as then the database would have to answer.
    assert asked == ["-h", "--clusters=there"]


def test_a_job_is_cancelled_where_it_is(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel, "time", slurm.clock)
    submit(slurm.run(THERE), 12, cluster="there")
    slurm.set_queue("12 PENDING Priority", cluster="there")
    slurm.on_scancel = lambda arguments: slurm.set_queue("12 CANCELLED", cluster="there")
    assert main(["cancel", f"--run={THERE}"]) == 0
    assert slurm.asked("scancel") == ["--clusters=there 12"]


def test_a_cluster_that_does_not_answer_hides_no_other(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(slurm.run(HERE), 12, cluster="here")
    submit(slurm.run(THERE), 13, cluster="there")
    slurm.set_queue("12 RUNNING")
    slurm.silent_clusters = {"there"}
    assert states(capsys) == {HERE: "running", THERE: "?"}
    # Where it is the only one that is asked, that is the answer.
    with pytest.raises(UserError, match="does not answer"):
        main(["status", f"--run={THERE}"])


@pytest.mark.parametrize(
    ("setting", "variables", "expected"),
    [
        ("", {}, ""),
        ("", {"SLURM_CLUSTERS": "b"}, "b"),
        ("", {"SLURM_CLUSTERS": "b", "SBATCH_CLUSTERS": "c"}, "c"),
        ("a", {"SLURM_CLUSTERS": "b", "SBATCH_CLUSTERS": "c"}, "a"),
    ],
)
def test_the_cluster_that_jobs_go_to(
    slurm: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    variables: dict[str, str],
    expected: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    site = replace(PRIVATE, slurm=replace(PRIVATE.slurm, cluster=setting))
    queue = clusters.chosen(site)
    assert queue.cluster == expected
    flag = [f"--clusters={expected}"] if expected else []
    assert queue.words("sbatch", "x") == ["sbatch", *flag, "x"]
    # It asks for a cluster in another way.
    assert queue.words("sacctmgr", "show") == ["sacctmgr", "show"]


@pytest.mark.parametrize("value", ["a,b", "all", "a b", "$(x)"])
def test_a_job_goes_to_one_cluster(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("SLURM_CLUSTERS", value)
    with pytest.raises(UserError, match="SLURM_CLUSTERS"):
        clusters.chosen(PRIVATE)


# ---- what the queue has forgotten -----------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "log", "began", "word", "said"),
    [
        ("12 FAILED 1:0", "", False, "failed", "exit code 1"),
        ("12 FAILED 1:0", "x\nerror: node1: no image\n", False, "failed", "error: node1: no image"),
        ("12 FAILED 0:53 node1", None, False, "failed", "cannot open"),
        ("12 TIMEOUT", "", True, "failed", "time limit"),
        ("12 OUT_OF_MEMORY 0:125", "", True, "failed", "memory"),
        ("12 CANCELLED", None, False, "cancelled", "before it started"),
        ("12 CANCELLED", "", False, "cancelled", "without saving"),
        ("12 CANCELLED 0:15 n1 2026-11-30T02:19:44", None, False, "cancelled", "without saving"),
        ("12 FAILED 0:53 node1", "x", False, "failed", "could not launch it on node1"),
        ("12 COMPLETED", "", False, "lost", "without a message"),
        # The database has not heard its end.
        ("12 RUNNING", None, False, "lost", "unknown"),
        ("", None, False, "lost", "whether it ever started is unknown"),
        ("", "x\nerror: no image\n", False, "lost", "error: no image"),
        ("", "", True, "lost", "it ended without a message"),
        (None, None, False, "lost", "whether it ever started is unknown"),
        (None, "Killed\n", False, "lost", "ends with: Killed"),
    ],
)
def test_of_a_forgotten_job_the_accounting_and_the_files_tell(
    slurm: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
    told: str | None,
    log: str | None,
    began: bool,
    word: str,
    said: str,
) -> None:
    folder = slurm.run(HERE, 12)
    if told is not None:
        slurm.accounting = [told] if told else []
    if log is not None:
        history.slurm_log(folder, 12).write_text(log)
    if began:
        attempt(folder, 1, 12)
    assert main(["status", "--format=json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert row["state"] == word
    assert said in row["note"]
    assert "never started" not in row["note"]


def test_the_accounting_is_not_asked_for_what_is_not_shown(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    make_old(slurm.run(HERE, 12))
    slurm.accounting = []
    assert states(capsys) == {}
    assert not slurm.asked("sacct")
    assert states(capsys, f"--run={HERE}") == {HERE: "lost"}
    assert len(slurm.asked("sacct")) == 1


def test_another_job_of_that_number_is_not_this_runs(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.run(HERE, 12)
    slurm.accounting = ["12 FAILED 1:0"]
    monkeypatch.setattr(slurm, "_folder_of", lambda _: "/somewhere/else")
    assert states(capsys) == {HERE: "lost"}


def test_an_odd_number_breaks_no_table(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, job_id in ((HERE, 12), (THERE, 13), (OTHER, 14)):
        slurm.run(name, job_id)
    slurm.set_queue("12_1 RUNNING", "13+0 PENDING Priority", "14 RUNNING")
    assert states(capsys) == {HERE: "running", THERE: "waiting", OTHER: "running"}
