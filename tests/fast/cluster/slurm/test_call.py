"""slurm.py: answers of Slurm's commands that differ from release to release."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from cluster.slurm import refusals
from cluster.slurm.call import Slurm


class Says(Slurm):
    """A Slurm that knows one answer."""

    def call(self, *command: str, **_: Any) -> str:
        return self.prefix[0]


@pytest.mark.parametrize("more", ["", "a "])
def test_an_estimate_of_any_release(more: str) -> None:
    said = f"sbatch: Job 2 to start at 2026-11-25T03:39:06 {more}using 4 processors on nodes "
    trial = Says(prefix=(said + "node[1-2] in partition gpu\n",)).trial(["sbatch", "x"], {})
    assert (trial.start, trial.nodes) == ("2026-11-25T03:39:06", "node[1-2]")
    assert str(trial) == "2026-11-25 03:39:06 on node[1-2]"


def test_an_estimate_that_is_none() -> None:
    trial = Says(prefix=("sbatch: some other words\n",)).trial(["sbatch", "x"], {})
    assert trial == refusals.Trial(notices=("some other words",))


# ---- what Slurm 22.05 said ------------------------------------------------------------------

REFUSED = """sbatch: error: Welcome: this cluster is in beta.
sbatch: error: you must name your project with --comment=PROJECT
sbatch: error: see https://site.example/projects
{}Unspecified error
"""
SENTENCES = (
    "Welcome: this cluster is in beta.; you must name your project with --comment=PROJECT; "
    "see https://site.example/projects; Unspecified error"
)
# The last lines of sbatch --test-only that sbatch itself may not repeat, and those that it does.
FOR_NOW = ("Requested node configuration is not available", "Requested nodes are busy")
FOR_EVER = (
    "Unspecified error",
    "Job submission is temporarily disabled for your group",
    "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
)
NO_DATABASE = """{0}: error: slurm_persist_conn_open_without_init: failed to open persistent \
connection to host:10.77.0.10:16819: Connection refused
{0}: error: Sending PersistInit msg: Connection refused
"""
OTHER_CLUSTER = """squeue: error: Problem talking to database
squeue: error: There is a problem talking to the database: Connection refused.  Only local cluster \
communication is available, remove --cluster from your command line or contact your admin.
"""


def said(monkeypatch: pytest.MonkeyPatch, *, out: str = "", err: str = "", code: int = 0) -> Slurm:
    """Return a Slurm whose commands say this."""
    done = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    return Slurm()


def test_all_sentences_of_a_refusal_are_kept_by_sbatch_and_by_its_trial_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = said(monkeypatch, err=REFUSED.format("allocation failure: "), code=1)
    trial = queue.trial(["sbatch", "x"], {})
    assert (trial.refusal, trial.is_for_now) == (SENTENCES, False)
    for_real = REFUSED.format("sbatch: error: Batch job submission failed: ")
    with pytest.raises(refusals.SlurmError) as refused:
        said(monkeypatch, err=for_real, code=1).call("sbatch", "x")
    assert str(refused.value) == SENTENCES


def test_a_greeting_is_a_notice_and_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "sbatch: Welcome: we are in beta.\nsbatch: Job 15 to start at 2026-11-30T02:20:00 "
    words += "using 1 processors on nodes node1 in partition gpu\n"
    trial = said(monkeypatch, err=words).trial(["sbatch", "x"], {})
    assert (trial.nodes, trial.notices, trial.refusal) == (
        "node1",
        ("Welcome: we are in beta.",),
        "",
    )
    words = "sbatch: error: Welcome: we are in beta.\nallocation failure: Requested node "
    words += "configuration is not available\n"
    assert said(monkeypatch, err=words, code=1).trial(["sbatch", "x"], {}).is_for_now


@pytest.mark.parametrize("own", [*FOR_NOW, *FOR_EVER])
def test_only_what_sbatch_itself_says_tells_whether_a_refusal_is_of_the_moment(
    monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    greeting = "GPU nodes are temporarily reserved; you must name your project; not available now"
    words = f"sbatch: error: {FOR_NOW[0]}\nsbatch: error: {greeting}\nallocation failure: {own}\n"
    trial = said(monkeypatch, err=words, code=1).trial(["sbatch", "x"], {})
    # Also where a plugin has said the same before.
    assert trial.refused[-2:] == (greeting, own)
    assert trial.is_for_now is (own in FOR_NOW)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (NO_DATABASE.format("sacctmgr"), refusals.DatabaseUnreachable),
        (NO_DATABASE.format("sacct"), refusals.DatabaseUnreachable),
        (OTHER_CLUSTER, refusals.DatabaseUnreachable),
        (
            "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n",
            refusals.ControllerUnreachable,
        ),
        (
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n",
            refusals.NoAnswer,
        ),
        ("scontrol: error: Invalid node name specified\n", refusals.SlurmError),
        # What a plugin tells of other things is not what sbatch has failed with.
        (
            "sbatch: error: Problem talking to the database? connection refused? Call us.\n"
            "sbatch: error: Batch job submission failed: Invalid account\n",
            refusals.SlurmError,
        ),
    ],
)
def test_who_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, words: str, kind: type[Exception]
) -> None:
    with pytest.raises(refusals.SlurmError) as refused:
        said(monkeypatch, err=words, code=1).call(words.partition(":")[0].split("_")[0])
    assert type(refused.value) is kind


def test_jobs_of_any_shape_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = """8|FAILED|node1|2026-11-30T02:19:57|5:00|JobLaunchFailure|/runs/a|b
7_[0-1]|PENDING||N/A|5:00|JobHeldUser|/tmp
10+1|PENDING||N/A|5:00|JobHeldUser|/tmp
CLUSTER: other
half a li|ne
"""
    jobs = said(monkeypatch, out=listed).jobs([7, 8, 10])
    assert {number: (job.state, job.folder) for number, job in jobs.items()} == {
        8: ("FAILED", "/runs/a|b"),
        7: ("PENDING", "/tmp"),
        10: ("PENDING", "/tmp"),
    }


def test_the_accounting_tells_of_what_has_ended_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = """4|FAILED|0:53|node1|2026-11-30T02:19:44|/runs/a
5|CANCELLED by 0|0:0|None assigned|None|/runs/b
6|RUNNING|0:0|node1|2026-11-30T02:19:44|/runs/c
"""
    jobs = said(monkeypatch, out=listed).ended([4, 5, 6])
    assert {number: (job.state, job.exit_code, job.nodes) for number, job in jobs.items()} == {
        4: ("FAILED", "0:53", "node1"),
        5: ("CANCELLED", "0:0", ""),
    }
    disabled = said(monkeypatch, err="Slurm accounting storage is disabled\n", code=1)
    assert disabled.ended([4]) == {}
