"""`make check JOB=`: the verdict on prepared situations, beside what Slurm does with the job."""

from __future__ import annotations

import getpass
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cluster import request, slurm
from cluster.check import overview, verdict
from cluster.check.finding import Verdict
from cluster.request import Request, Sizes
from cluster.site import PRIVATE, Site
from tests.cluster.local import LOCAL, Cluster, wait_until
from tests.conftest import CHECKOUT

pytestmark = pytest.mark.needs("slurm")

# Why a job waits that starts as soon as others end or nodes come back.
FOR_NOW = "Resources|Priority|ReqNodeNotAvail|Nodes.required|Reservation|.*Limit|Assoc|QOS|Max"
ASKED = {"num_nodes": 1, "gpus_per_node": 1, "time": "10"}


@dataclass(frozen=True)
class Ground:
    """A cluster on which situations are prepared, and the user whose jobs are judged."""

    cluster: Cluster
    user: str

    @property
    def queue(self) -> slurm.Slurm:
        """Slurm as the user has it."""
        return slurm.Slurm(prefix=(str(LOCAL / "exec.sh"), "--user", self.user, "--"))

    def site(self, **values: Any) -> Site:
        """Return the site, some of whose settings are others."""
        return replace(PRIVATE, slurm=replace(PRIVATE.slurm, **values))

    def judge(self, site: Site, **sizes: str) -> verdict.Answer:
        """Return the verdict on a job of these sizes."""
        return verdict.on(self.queue, site, self.request(site, **sizes), "situation")

    def request(self, site: Site, **sizes: str) -> Request:
        return request.resolve(
            site, Sizes(**sizes), asked=ASKED, origin="the situation", on_cpu=False
        )

    def submit(self, site: Site, *, user: str = "", **sizes: str) -> tuple[str, str]:
        """Queue the job for real; return its number, or how sbatch refuses it."""
        words = request.sbatch(site, self.request(site, **sizes), name="s", folder=Path("/tmp"))
        words += ["--output=/dev/null", "--wrap", "exec sleep 300"]
        passed = {key: os.environ[key] for key in ("SBATCH_RESERVATION",) if key in os.environ}
        done = self.cluster.run(*words, user=user or self.user, environment=passed)
        return (done.stdout.strip(), "") if done.returncode == 0 else ("", done.stderr.strip())

    def state(self, job: str) -> tuple[str, str]:
        """Return a job's state, and why it waits."""
        state, _, reason = self.cluster.output(
            "squeue", "--noheader", "--states=all", f"--jobs={job}", "-o", "%T|%r"
        ).partition("|")
        return state, reason

    def fate(self, job: str) -> tuple[str, str]:
        """Return the same once Slurm has looked at it."""
        wait_until(
            lambda: self.state(job) not in (("PENDING", "None"), ("CONFIGURING", "None")),
            20,
            f"job {job} is looked at",
        )
        return self.state(job)

    def occupy(self, site: Site, *, user: str = "", **sizes: str) -> str:
        """Let a job run that takes this much."""
        job, refusal = self.submit(site, user=user, **sizes)
        assert job, refusal
        self.cluster.wait_for(job, "RUNNING", timeout=20)
        return job

    def change(self, *words: str) -> None:
        self.cluster.output(*words)

    def limit(self, what: str, *words: str) -> None:
        """Set limits of a QOS, of the user, or of the account: "qos normal", "user"."""
        whom = {"user": ("user", self.user), "account": ("account", "research")}.get(
            what, tuple(what.split())
        )
        where = ("where", "account=research") if whom[0] == "user" else ()
        if where:
            kind, name = whom
            change = ("modify", kind, "where", f"name={name}", "account=research", "set", *words)
        else:
            change = ("modify", *whom, "set", *words)
        self.change("sacctmgr", "--immediate", *change)

    def update(self, *words: str) -> None:
        self.change("scontrol", "update", *words)

    def let_wait(self) -> None:
        """Let a job run on one node, and one wait that wants both, for whom the other is kept."""
        self.occupy(self.site(), gpus="2", time="10")
        job, _ = self.submit(self.site(), nodes="2", gpus="2", time="20")
        layout = ("squeue", "--noheader", f"--jobs={job}", "--Format=SchedNodes")
        wait_until(lambda: "node" in self.cluster.output(*layout), 20, f"job {job} is planned")

    def lose(self, node: str) -> None:
        """Take a node's power, and have it down at once; with it, it would come back by itself."""
        self.cluster.drill("power-off", node)
        self.update(f"NodeName={node}", "State=DOWN", "Reason=lost")

    def find(self, node: str) -> None:
        """Give it back."""
        self.empty()
        self.cluster.drill("power-on", node)

    def is_idle(self) -> bool:
        """Whether all nodes are, and answer: a * is behind the state of one that does not."""
        return set(self.cluster.output("sinfo", "--noheader", "-o", "%T").split()) == {"idle"}

    def empty(self) -> None:
        """End all jobs."""
        for user in {self.user, "root"}:
            self.cluster.run("scancel", "--quiet", f"--user={user}")

        def is_empty() -> bool:
            return not self.cluster.output("squeue", "--noheader")

        wait_until(is_empty, 30, "the queue is empty")


@pytest.fixture(scope="module")
def ground(cluster: Cluster) -> Ground:
    os.environ["SLUICE_CLUSTER"] = str(cluster.folder)
    return Ground(cluster, cluster.users[0] if cluster.users else getpass.getuser())


@pytest.fixture
def clean(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, ground.user)
    for name in ("SBATCH_ACCOUNT", "SBATCH_RESERVATION", "SLUICE_CLUSTER_INSIDE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLUICE_CLUSTER", str(ground.cluster.folder))
    wait_until(ground.is_idle, 40, "all nodes are idle")
    yield ground
    ground.empty()


@contextmanager
def undone(*steps: Callable[[], Any]) -> Iterator[None]:
    """Do the first, and the second when it is over."""
    steps[0]()
    try:
        yield
    finally:
        steps[1]()


@dataclass(frozen=True)
class Situation:
    """How things are, what is asked for, and what is to be said of it."""

    name: str
    verdict: Verdict
    limit: str = ""
    """The first limit that is named; empty: none."""
    fits_with: str | None = None
    """The setting that is said to fit; None: not looked at."""
    site: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Ground], Any] = lambda ground: None
    undo: Callable[[Ground], Any] = lambda ground: None
    variables: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def _limits(what: str, set_: str, back: str) -> dict[str, Callable[[Ground], Any]]:
    return {
        "prepare": lambda ground: ground.limit(what, *set_.split()),
        "undo": lambda ground: ground.limit(what, *back.split()),
    }


def _partition(set_: str, back: str, name: str = "short") -> dict[str, Callable[[Ground], Any]]:
    return {
        "prepare": lambda ground: ground.update(f"PartitionName={name}", *set_.split()),
        "undo": lambda ground: ground.update(f"PartitionName={name}", *back.split()),
    }


def _nodes(names: str, state: str) -> dict[str, Callable[[Ground], Any]]:
    return {
        "prepare": lambda ground: ground.update(
            f"NodeName={names}", f"State={state}", "Reason=a test State=IDLE"
        ),
        "undo": lambda ground: ground.update(f"NodeName={names}", "State=RESUME"),
    }


def _reserved(*words: str) -> dict[str, Callable[[Ground], Any]]:
    def prepare(ground: Ground) -> None:
        given = [word.replace("USER", ground.user) for word in words]
        ground.change("scontrol", "create", "reservation=kept", "duration=60", *given)

    return {
        "prepare": prepare,
        "undo": lambda ground: (
            ground.empty(),
            ground.change("scontrol", "delete", "reservation=kept"),
        ),
    }


def _with_running(
    what: str, set_: str, back: str, **sizes: str
) -> dict[str, Callable[[Ground], Any]]:
    """Set limits while a job of this size runs."""

    def prepare(ground: Ground) -> None:
        ground.occupy(ground.site(), **sizes)
        if what:
            ground.limit(what, *set_.split())

    def undo(ground: Ground) -> None:
        if what:
            ground.limit(what, *back.split())

    return {"prepare": prepare, "undo": undo}


def _partition_qos(set_: str, back: str, *, of_job: str) -> dict[str, Callable[[Ground], Any]]:
    """Give the partition a QOS with limits, and the QOS urgent others."""

    def prepare(ground: Ground) -> None:
        if set_:
            ground.change("sacctmgr", "--immediate", "add", "qos", "fast", *set_.split())
            ground.update("PartitionName=short", "QOS=fast")
        ground.limit("qos urgent", *of_job.split())

    def undo(ground: Ground) -> None:
        flags = [word.replace("=", "-=") for word in of_job.split() if word.startswith("Flags")]
        ground.limit("qos urgent", "MaxWall=-1", *flags)
        if set_:
            ground.update("PartitionName=short", "QOS=")
            ground.change("sacctmgr", "--immediate", "delete", "qos", "fast")

    return {"prepare": prepare, "undo": undo}


FITS, WAITS, NEVER = Verdict.FITS, Verdict.WAITS, Verdict.NEVER
QOS = "qos normal"
SITUATIONS = [
    Situation("an empty cluster", FITS, sizes={"nodes": "2", "gpus": "2"}),
    # ---- nodes ----
    Situation(
        "one node drained, two wanted",
        WAITS,
        "Nodes",
        "NODES=1",
        sizes={"nodes": "2"},
        **_nodes("node2", "DRAIN"),
    ),
    Situation("one node drained, one wanted", FITS, **_nodes("node2", "DRAIN")),
    Situation("all drained", WAITS, "Nodes", "", **_nodes("node[1-2]", "DRAIN")),
    Situation(
        "one node down, two wanted",
        WAITS,
        "Nodes",
        "NODES=1",
        sizes={"nodes": "2"},
        prepare=lambda ground: ground.lose("node2"),
        undo=lambda ground: ground.find("node2"),
    ),
    Situation(
        "full",
        WAITS,
        "Resources",
        "",
        **_with_running("", "", "", nodes="2", gpus="2"),
    ),
    Situation(
        "half of it full, two nodes wanted",
        WAITS,
        "Resources",
        "NODES=1",
        sizes={"nodes": "2"},
        **_with_running("", "", "", gpus="2"),
    ),
    Situation(
        "half of a node free",
        FITS,
        sizes={"nodes": "2"},
        **_with_running("", "", "", nodes="2", gpus="1"),
    ),
    Situation("too many nodes", NEVER, "MaxNodes", "NODES=2", sizes={"nodes": "3"}),
    Situation(
        "more memory than a node has",
        NEVER,
        "Nodes",
        "slurm.memory_per_node_mb = 8000",
        site={"memory_per_node_mb": 9000},
        sizes={"gpus": "2"},
    ),
    Situation("a type of GPU that there is not", NEVER, "Nodes", site={"gpu_type": "a100"}),
    Situation(
        "a feature that no node has",
        NEVER,
        "Nodes",
        site={"sbatch_flags": ["--constraint=no-such"]},
    ),
    Situation(
        "more CPUs than a node has",
        NEVER,
        "Nodes",
        "slurm.cpus_per_node = 4",
        site={"cpus_per_node": 6},
        sizes={"gpus": "2"},
    ),
    # ---- reservations ----
    Situation(
        "all reserved for another",
        WAITS,
        "Reservation",
        "",
        **_reserved("nodes=ALL", "users=root", "starttime=now"),
    ),
    Situation(
        "reserved for me, and asked for",
        FITS,
        variables={"SBATCH_RESERVATION": "kept"},
        **_reserved("nodes=node2", "users=USER", "starttime=now"),
    ),
    Situation(
        "a maintenance before the end",
        WAITS,
        "Reservation",
        sizes={"time": "2:00:00"},
        **_reserved("nodes=ALL", "users=root", "starttime=now+30minutes", "flags=maint"),
    ),
    Situation(
        "over before the maintenance",
        FITS,
        sizes={"time": "20"},
        **_reserved("nodes=ALL", "users=root", "starttime=now+30minutes", "flags=maint"),
    ),
    Situation(
        "a reservation that is not there",
        NEVER,
        "Reservation",
        variables={"SBATCH_RESERVATION": "nothing"},
    ),
    # ---- partitions ----
    Situation(
        "above the partition's time",
        NEVER,
        "MaxTime",
        "TIME=00:30:00",
        site={"partition": "short"},
        sizes={"time": "31"},
    ),
    Situation(
        "above the partition's nodes",
        NEVER,
        "MaxNodes",
        "NODES=1",
        site={"partition": "short"},
        sizes={"nodes": "2"},
    ),
    Situation("a partition that is down", NEVER, "State", site={"partition": "down"}),
    Situation(
        "a partition that drains",
        NEVER,
        "State",
        site={"partition": "short"},
        **_partition("State=DRAIN", "State=UP"),
    ),
    Situation(
        "a partition for other accounts",
        NEVER,
        "AllowAccounts",
        'slurm.account = "closed"',
        site={"partition": "short"},
        **_partition("AllowAccounts=closed", "AllowAccounts=ALL"),
    ),
    Situation(
        "a partition for other QOS",
        NEVER,
        "AllowQos",
        'slurm.qos = "urgent"',
        site={"partition": "short"},
        **_partition("AllowQos=urgent", "AllowQos=ALL"),
    ),
    Situation(
        "a partition that wants a reservation",
        NEVER,
        "ReqResv",
        site={"partition": "short"},
        **_partition("ReqResv=YES", "ReqResv=NO"),
    ),
    Situation(
        "above the partition's CPUs of a node",
        NEVER,
        "MaxCPUsPerNode",
        "slurm.cpus_per_node = 2",
        site={"partition": "short"},
        sizes={"gpus": "2"},
        **_partition("MaxCPUsPerNode=2", "MaxCPUsPerNode=UNLIMITED"),
    ),
    # ---- accounts and QOS ----
    Situation(
        "another's account",
        NEVER,
        "Account",
        'slurm.account = "research"',
        site={"account": "closed"},
    ),
    Situation(
        "a QOS that there is not", NEVER, "QOS", 'slurm.qos = "normal"', site={"qos": "golden"}
    ),
    Situation(
        "above the QOS's time",
        NEVER,
        "MaxWall",
        "TIME=00:10:00",
        site={"qos": "short"},
        sizes={"time": "11"},
    ),
    Situation(
        "above the account's time",
        NEVER,
        "MaxWall",
        "TIME=00:05:00",
        **_limits("user", "MaxWall=5", "MaxWall=-1"),
    ),
    Situation(
        "a QOS's time before the account's",
        FITS,
        site={"qos": "short"},
        **_limits("user", "MaxWall=5", "MaxWall=-1"),
    ),
    Situation(
        "nodes of a job of the QOS",
        NEVER,
        "MaxTRESPJ node",
        "NODES=1",
        sizes={"nodes": "2"},
        **_limits(QOS, "MaxTRES=node=1", "MaxTRES=node=-1"),
    ),
    Situation(
        "GPUs of a node in the QOS",
        NEVER,
        "MaxTRESPN gres/gpu",
        "GPUS=1",
        sizes={"gpus": "2"},
        **_limits(QOS, "MaxTRESPerNode=gres/gpu=1", "MaxTRESPerNode=gres/gpu=-1"),
    ),
    Situation(
        "too small for the QOS",
        NEVER,
        "MinTRESPJ gres/gpu",
        **_limits(QOS, "MinTRES=gres/gpu=2", "MinTRES=gres/gpu=-1"),
    ),
    Situation(
        "minutes of a job",
        NEVER,
        "MaxTRESMinsPJ gres/gpu",
        "TIME=0:08:00",
        **_limits(QOS, "MaxTRESMins=gres/gpu=8", "MaxTRESMins=gres/gpu=-1"),
    ),
    Situation(
        "fewer minutes of the account than the job may last",
        FITS,
        "GrpTRESMins cpu",
        **_limits("account", "GrpTRESMins=cpu=10", "GrpTRESMins=cpu=-1"),
    ),
    Situation(
        "GPUs of a user",
        NEVER,
        "MaxTRESPU gres/gpu",
        "GPUS=1",
        sizes={"gpus": "2"},
        **_limits(QOS, "MaxTRESPU=gres/gpu=1", "MaxTRESPU=gres/gpu=-1"),
    ),
    Situation(
        "GPUs of a user, in use",
        WAITS,
        "MaxTRESPU gres/gpu",
        "",
        **_with_running(QOS, "MaxTRESPU=gres/gpu=2", "MaxTRESPU=gres/gpu=-1", gpus="2"),
    ),
    Situation(
        "GPUs of a user, in use, but none wanted",
        FITS,
        sizes={"gpus": "0"},
        **_with_running(QOS, "MaxTRESPU=gres/gpu=2", "MaxTRESPU=gres/gpu=-1", gpus="2"),
    ),
    Situation(
        "CPUs of an account, in use",
        WAITS,
        "MaxTRESPA cpu",
        "",
        **_with_running(QOS, "MaxTRESPA=cpu=5", "MaxTRESPA=cpu=-1", gpus="2"),
    ),
    Situation(
        "the accounts above, in use",
        WAITS,
        "GrpTRES gres/gpu",
        "",
        **_with_running("account", "GrpTRES=gres/gpu=2", "GrpTRES=gres/gpu=-1", gpus="2"),
    ),
    Situation(
        "the accounts above",
        NEVER,
        "GrpTRES cpu",
        "NODES=1",
        sizes={"nodes": "2", "gpus": "2"},
        **_limits("account", "GrpTRES=cpu=4", "GrpTRES=cpu=-1"),
    ),
    Situation(
        "as many jobs as may run",
        WAITS,
        "MaxJobs",
        "",
        **_with_running("user", "MaxJobs=1", "MaxJobs=-1"),
    ),
    Situation(
        "as many jobs as may be queued",
        WAITS,
        "MaxSubmitJobs",
        "",
        **_with_running("user", "MaxSubmitJobs=1", "MaxSubmitJobs=-1"),
    ),
    Situation(
        "no jobs at all",
        NEVER,
        "MaxSubmitJobs",
        "",
        **_limits("user", "MaxSubmitJobs=0", "MaxSubmitJobs=-1"),
    ),
    # ---- QOS over QOS ----
    Situation(
        "the partition's QOS before the job's",
        NEVER,
        "MaxWall",
        "TIME=00:05:00",
        site={"partition": "short"},
        **_partition_qos("MaxWall=5", "MaxWall=-1", of_job="MaxWall=-1"),
    ),
    Situation(
        "the job's QOS, which goes before the partition's",
        FITS,
        site={"partition": "short", "qos": "urgent"},
        **_partition_qos("MaxWall=5", "MaxWall=-1", of_job="Flags=OverPartQOS MaxWall=20"),
    ),
    Situation(
        "a QOS that frees of the partition's time",
        FITS,
        site={"partition": "short", "qos": "urgent"},
        sizes={"time": "40"},
        **_partition_qos("", "", of_job="Flags=PartitionTimeLimit"),
    ),
    # ---- others ----
    Situation(
        "a job before it in line, for whom nodes are kept",
        WAITS,
        "Priority",
        prepare=lambda ground: ground.let_wait(),
        sizes={"time": "3:00:00"},
    ),
    Situation(
        "a short job beside one that waits",
        FITS,
        prepare=lambda ground: ground.let_wait(),
        sizes={"time": "5"},
    ),
]


def _is_refused_for_now(refusal: str) -> bool:
    return bool(re.search("(?i)submit|policy", refusal))


@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
def test_the_verdict_is_what_slurm_then_does(
    clean: Ground, situation: Situation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in situation.variables.items():
        monkeypatch.setenv(name, value)
    site = clean.site(**situation.site)
    with undone(lambda: situation.prepare(clean), lambda: situation.undo(clean)):
        answer = clean.judge(site, **situation.sizes)
        job, refusal = clean.submit(site, **situation.sizes)
        if answer.verdict is FITS and job:
            # Beside one that waits, it starts at the next turn of the scheduler.
            clean.cluster.wait_for(job, "RUNNING", "COMPLETED", timeout=20)
        state, reason = clean.fate(job) if job else ("REFUSED", refusal)
        said = f"{answer}\nSlurm: {state} {reason}"
        assert answer.verdict == situation.verdict, said
        assert [f.limit for f in answer.findings][:1] == (
            [situation.limit] if situation.limit else []
        ), said
        if situation.fits_with is not None:
            assert answer.findings[0].fits_with == situation.fits_with, said
        if answer.verdict is FITS:
            assert state == "RUNNING", said
        elif answer.verdict is NEVER:
            assert state in ("REFUSED", "PENDING"), said
            assert reason not in ("Resources", "Priority", "None"), said
        elif state == "REFUSED":
            assert answer.findings[0].limit.startswith("MaxSubmit"), said
            assert _is_refused_for_now(reason), said
        else:
            assert state == "PENDING", said
            assert re.match(FOR_NOW, reason), said
    # Where others run, ending them would end the situation and not the wait.
    is_alone = not situation.name.startswith(("full", "half", "a job before"))
    if answer.verdict is WAITS and job and is_alone:
        _starts_once_it_is_over(clean, job)


class Mute(slurm.Slurm):
    """A Slurm whose accounting is hidden: sacctmgr shows nothing, and calls that a success."""

    def call(self, *command: str, **options: Any) -> str:
        return "" if command[0] == "sacctmgr" else super().call(*command, **options)


def test_where_sacctmgr_shows_nothing_the_controller_is_believed(clean: Ground) -> None:
    queue = Mute(prefix=clean.queue.prefix)
    site = clean.site()

    def judge() -> verdict.Answer:
        return verdict.on(queue, site, clean.request(site), "situation")

    answer = judge()
    assert answer.verdict is FITS
    assert any("sacctmgr shows no association" in remark for remark in answer.remarks)
    clean.occupy(site)
    with undone(
        lambda: clean.limit("user", "MaxJobs=1"), lambda: clean.limit("user", "MaxJobs=-1")
    ):
        assert [finding.limit for finding in judge().findings] == ["MaxJobs"]
        job, _ = clean.submit(site)
        assert clean.fate(job) == ("PENDING", "AssocMaxJobsLimit")


def command(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command as on the machine that holds the cluster."""
    return subprocess.run(
        words,
        check=False,
        cwd=CHECKOUT,
        env=cluster.environment | {"VENV": sys.prefix},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_exit_codes_of_the_command_and_of_make(clean: Ground) -> None:
    check = (sys.executable, "-m", "cluster.jobs", "check")
    make = ("make", "--no-print-directory", "check")
    job = "JOB=tinyllama"
    done = command(clean.cluster, *check, "--job=tinyllama", "--time=10", "--format=json")
    content = json.loads(done.stdout)
    assert (done.returncode, content["verdict"], content["version"]) == (0, 0, 1)
    assert content["request"]["time"] == "10"
    done = command(clean.cluster, *check, "--job=tinyllama", "--nodes=3", "--format=json")
    content = json.loads(done.stdout)
    assert (done.returncode, content["verdict"]) == (2, 2)
    assert content["findings"][0]["fits_with"] == "NODES=2"
    done = command(clean.cluster, *make, job, "GPUS=3")
    assert done.returncode == 2
    assert "can never run" in done.stdout
    clean.occupy(clean.site(), nodes="2", gpus="2")
    done = command(clean.cluster, *check, "--job=tinyllama")
    assert done.returncode == 1
    assert re.search(r"will wait, until [\d: A-Z]+ as Slurm expects", done.stdout)
    # Only what can never be is a failure to make.
    done = command(clean.cluster, *make, job)
    assert (done.returncode, done.stderr) == (0, "")
    assert "will wait" in done.stdout
    # No answer is no verdict.
    nowhere = replace(
        clean.cluster, environment=clean.cluster.environment | {"SLUICE_CLUSTER": "/nowhere"}
    )
    done = command(nowhere, *check, "--job=tinyllama")
    assert done.returncode == 2
    assert "make cluster-up" in done.stderr


def test_the_overview_tells_what_there_is(clean: Ground) -> None:
    clean.occupy(clean.site(), gpus="1")
    with undone(
        lambda: clean.limit(QOS, "MaxTRESPU=gres/gpu=3"),
        lambda: clean.limit(QOS, "MaxTRESPU=gres/gpu=-1"),
    ):
        facts = overview.facts(clean.queue)
        done = command(clean.cluster, "make", "--no-print-directory", "check")
    (gpu,) = [one for one in facts["partitions"] if one["name"] == "gpu"]
    assert (gpu["free_cpus"], gpu["whole_free_nodes"]) == (6, 1)
    assert gpu["gpus"] == [{"type": None, "free": 3, "total": 4}]
    assert [job["state"] for job in facts["jobs"]] == ["RUNNING"]
    (used,) = [q["limits"] for q in facts["qos"] if q["name"] == "normal"]
    assert [(one["name"], one["limit"], one["used"]) for one in used] == [("MaxTRESPU", 3, 1)]
    assert facts["fair_share"][0]["account"] == "research"
    assert facts["associations"][0]["account"] == "research"
    assert done.returncode == 0, done.stderr
    assert re.search(r"(?m)^gpu\* +UP +1-00:00:00 +2 +1-2 +1 +6 of 8 +3 of 4", done.stdout)


def _starts_once_it_is_over(ground: Ground, job: str) -> None:
    """What had to wait starts as soon as nothing hinders it."""
    others = ground.cluster.output("squeue", "--noheader", "-o", "%i").split()
    for other in set(others) - {job}:
        ground.change("scancel", other)
    if ground.cluster.run("squeue", "--noheader", f"--jobs={job}").stdout.strip():
        ground.cluster.wait_for(job, "RUNNING", timeout=30)
