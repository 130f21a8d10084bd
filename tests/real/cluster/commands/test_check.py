"""`make check JOB=`: the verdict on prepared situations, beside what Slurm does with the job.

A scene is how things are on a few nodes. It has a partition of its own and, where it sets limits,
an account and a QOS, so that what it does reaches no other: many are prepared, judged, submitted
and looked at together.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.check import limits, overview, verdict
from cluster.check.finding import Verdict
from cluster.commands import check
from cluster.plan.request import Request, Sizes, resolve_request, sbatch_command
from cluster.site.settings import PRIVATE, Site
from cluster.slurm.call import Slurm
from runfolder.errors import UserError
from tests import waiting
from tests.real.private_slurm import LOCAL, Cluster, Result, start_cluster
from tests.shared import CHECKOUT
from tests.waiting import wait_until

pytestmark = pytest.mark.needs("slurm")

# As many as slurm/local/up.sh gives.
NUM_NODES = 16


@pytest.fixture(scope="module")
def cluster(short_folder: Path, users: tuple[str, ...]) -> Iterator[Cluster]:
    """Return a Slurm with many nodes, whose limits nobody else needs."""
    size = ("--nodes", str(NUM_NODES), "--ssh-port", "0")
    made = start_cluster(short_folder / "check", users, *size)
    yield made
    done = made.local("down.sh")
    assert done.returncode == 0, done.stderr


# ---- situations -----------------------------------------------------------------------------

FITS, WAITS, NEVER = Verdict.FITS, Verdict.WAITS, Verdict.NEVER


@dataclass(frozen=True)
class Situation:
    """A job that is judged in a scene, and what is to be said of it."""

    name: str
    verdict: Verdict
    limit: str = ""
    """The first limit that is named; empty: none."""
    fits_with: str | None = None
    """The setting that is said to fit; None: not looked at."""
    site: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Scene:
    """How things are for the jobs that are judged in it; limits and settings in Slurm's words."""

    situations: list[Situation]
    nodes: int = 0
    """How many it has to itself; 0: it shares two, and its jobs get half of one at most."""
    drained: int = 0
    """So many of these, the last ones."""
    lost: int = 0
    """So many have no power."""
    reserved: str = ""
    """A reservation of the last node."""
    partition: str = ""
    partition_qos: str = ""
    """Limits of the QOS of its partition."""
    account: str = ""
    user: str = ""
    """Limits of the user in the account."""
    qos: str = ""
    """Limits of the QOS that jobs of the account have which name none."""
    running: Sequence[dict[str, str]] = ()
    """Sizes of jobs that run already."""
    waiting: Sequence[dict[str, str]] = ()
    """Of those that wait, and for which Slurm has a plan."""

    @property
    def has_account(self) -> bool:
        return bool(self.account or self.user or self.qos)


LARGE = {"gpus": "2"}
TWO = {"nodes": "2"}
IN_LINE: dict[str, Any] = {
    "running": [{"gpus": "2", "time": "60"}],
    "waiting": [{"nodes": "2", "gpus": "2", "time": "20"}],
}
SCENES = [
    # ---- sizes ----
    Scene([Situation("too many nodes", NEVER, "MaxNodes", "NODES=2", sizes={"nodes": "3"})]),
    Scene(
        [
            Situation(
                "more memory than a node has",
                NEVER,
                "Nodes",
                "slurm.memory_per_node_mb = 8000",
                site={"memory_per_node_mb": 9000},
                sizes=LARGE,
            )
        ]
    ),
    Scene(
        [Situation("a type of GPU that there is not", NEVER, "Nodes", site={"gpu_type": "a100"})]
    ),
    Scene(
        [
            Situation(
                "a feature that no node has",
                NEVER,
                "Nodes",
                site={"sbatch_flags": ["--constraint=no-such"]},
            )
        ]
    ),
    Scene(
        [
            Situation(
                "more CPUs than a node has",
                NEVER,
                "Nodes",
                "slurm.cpus_per_node = 4",
                site={"cpus_per_node": 6},
                sizes=LARGE,
            )
        ]
    ),
    # ---- partitions ----
    Scene(
        [
            Situation(
                "above the partition's time",
                NEVER,
                "MaxTime",
                "TIME=00:30:00",
                sizes={"time": "31"},
            )
        ],
        partition="MaxTime=30",
    ),
    Scene(
        [Situation("above the partition's nodes", NEVER, "MaxNodes", "NODES=1", sizes=TWO)],
        partition="MaxNodes=1",
    ),
    Scene([Situation("a partition that is down", NEVER, "State")], partition="State=DOWN"),
    Scene([Situation("a partition that drains", NEVER, "State")], partition="State=DRAIN"),
    Scene(
        [
            Situation(
                "a partition for other accounts", NEVER, "AllowAccounts", 'slurm.account = "closed"'
            )
        ],
        partition="AllowAccounts=closed",
    ),
    Scene(
        [Situation("a partition for other QOS", NEVER, "AllowQos", 'slurm.qos = "urgent"')],
        partition="AllowQos=urgent",
    ),
    Scene(
        [Situation("a partition that wants a reservation", NEVER, "ReqResv")],
        partition="ReqResv=YES",
    ),
    Scene(
        [
            Situation(
                "above the partition's CPUs of a node",
                NEVER,
                "MaxCPUsPerNode",
                "slurm.cpus_per_node = 2",
                sizes=LARGE,
            )
        ],
        partition="MaxCPUsPerNode=2",
    ),
    Scene(
        [Situation("a partition for jobs of other hosts", NEVER, "sbatch --test-only", "")],
        partition="AllocNodes=node1",
    ),
    # ---- what a job gets that asks for no memory, and what comes with memory ----
    Scene(
        [Situation("less memory for each GPU than for each node", FITS)],
        nodes=1,
        partition="DefMemPerNode=8000 JobDefaults=DefMemPerGPU=1000",
        running=[{}],
    ),
    Scene(
        [Situation("memory of a GPU, most of it in use", WAITS, "Resources", "")],
        nodes=1,
        partition="JobDefaults=DefMemPerGPU=5000",
        running=[{}],
    ),
    Scene(
        [Situation("more memory for its GPUs than a node has", NEVER, "Nodes", sizes=LARGE)],
        partition="JobDefaults=DefMemPerGPU=5000",
    ),
    Scene(
        [Situation("memory of a CPU, most of it in use", WAITS, "Resources", "")],
        nodes=1,
        partition="DefMemPerCPU=2500",
        running=[{}],
    ),
    Scene(
        [Situation("memory of a node, most of it in use", WAITS, "Resources", "")],
        nodes=1,
        partition="DefMemPerNode=4500",
        running=[{}],
    ),
    Scene(
        [
            Situation(
                "memory for which a node lacks CPUs",
                NEVER,
                "Nodes",
                site={"memory_per_node_mb": 4000},
                sizes=LARGE,
            ),
            Situation("memory for which a node has CPUs", FITS),
        ],
        nodes=1,
        partition="MaxMemPerCPU=500",
    ),
    # ---- nodes that are shared in other ways ----
    Scene(
        [Situation("CPUs that are given out twice", FITS, sizes={"gpus": "0"})],
        nodes=1,
        partition="OverSubscribe=FORCE:2",
        running=[{"gpus": "0"}],
    ),
    Scene(
        [Situation("the partition's CPUs of a node, in use", WAITS, "Start", "")],
        nodes=1,
        partition="MaxCPUsPerNode=2",
        running=[{}],
    ),
    Scene(
        [Situation("nodes of one user, in use by me", FITS)],
        nodes=1,
        partition="ExclusiveUser=YES",
        running=[{}],
    ),
    Scene(
        [Situation("nodes of one job, in use", WAITS, "Resources", "")],
        nodes=1,
        partition="OverSubscribe=EXCLUSIVE",
        running=[{}],
    ),
    # ---- accounts and QOS ----
    Scene(
        [
            Situation(
                "another's account",
                NEVER,
                "Account",
                'slurm.account = "research"',
                site={"account": "closed"},
            )
        ]
    ),
    Scene(
        [
            Situation(
                "a QOS that there is not",
                NEVER,
                "QOS",
                'slurm.qos = "normal"',
                site={"qos": "golden"},
            )
        ]
    ),
    Scene(
        [
            Situation(
                "above the QOS's time",
                NEVER,
                "MaxWall",
                "TIME=00:10:00",
                site={"qos": "short"},
                sizes={"time": "11"},
            )
        ]
    ),
    Scene(
        [
            Situation("above the account's time", NEVER, "MaxWall", "TIME=00:05:00"),
            Situation("a QOS's time before the account's", FITS, site={"qos": "short"}),
        ],
        user="MaxWall=5",
    ),
    Scene(
        [Situation("nodes of a job of the QOS", NEVER, "MaxTRESPJ node", "NODES=1", sizes=TWO)],
        qos="MaxTRES=node=1",
    ),
    Scene(
        [
            Situation(
                "GPUs of a node in the QOS", NEVER, "MaxTRESPN gres/gpu", "GPUS=1", sizes=LARGE
            )
        ],
        qos="MaxTRESPerNode=gres/gpu=1",
    ),
    Scene(
        [Situation("too small for the QOS", NEVER, "MinTRESPJ gres/gpu")], qos="MinTRES=gres/gpu=2"
    ),
    Scene(
        [Situation("minutes of a job", NEVER, "MaxTRESMinsPJ gres/gpu", "TIME=0:08:00")],
        qos="MaxTRESMins=gres/gpu=8",
    ),
    Scene(
        [Situation("fewer minutes of the account than the job may last", FITS, "GrpTRESMins cpu")],
        account="GrpTRESMins=cpu=10",
    ),
    Scene(
        [Situation("GPUs of a user", NEVER, "MaxTRESPU gres/gpu", "GPUS=1", sizes=LARGE)],
        qos="MaxTRESPU=gres/gpu=1",
    ),
    Scene(
        [
            Situation("GPUs of a user, in use", WAITS, "MaxTRESPU gres/gpu", ""),
            Situation("GPUs of a user, in use, but none wanted", FITS, sizes={"gpus": "0"}),
        ],
        nodes=2,
        qos="MaxTRESPU=gres/gpu=2",
        running=[LARGE],
    ),
    Scene(
        [Situation("CPUs of an account, in use", WAITS, "MaxTRESPA cpu", "")],
        nodes=2,
        qos="MaxTRESPA=cpu=5",
        running=[LARGE],
    ),
    Scene(
        [Situation("the accounts above, in use", WAITS, "GrpTRES gres/gpu", "")],
        nodes=2,
        account="GrpTRES=gres/gpu=2",
        running=[LARGE],
    ),
    Scene(
        [
            Situation(
                "the accounts above",
                NEVER,
                "GrpTRES cpu",
                "NODES=1",
                sizes={"nodes": "2", "gpus": "2"},
            )
        ],
        account="GrpTRES=cpu=4",
    ),
    Scene(
        [Situation("as many jobs as may run", WAITS, "MaxJobs", "")],
        nodes=1,
        user="MaxJobs=1",
        running=[{}],
    ),
    Scene(
        [Situation("as many jobs as may be queued", WAITS, "MaxSubmitJobs", "")],
        nodes=1,
        user="MaxSubmitJobs=1",
        running=[{}],
    ),
    Scene([Situation("no jobs at all", NEVER, "MaxSubmitJobs", "")], user="MaxSubmitJobs=0"),
    # ---- QOS over QOS ----
    Scene(
        [Situation("the partition's QOS before the job's", NEVER, "MaxWall", "TIME=00:05:00")],
        partition_qos="MaxWall=5",
    ),
    Scene(
        [Situation("the job's QOS, which goes before the partition's", FITS)],
        partition_qos="MaxWall=5",
        qos="Flags=OverPartQOS MaxWall=20",
    ),
    Scene(
        [Situation("a QOS that frees of the partition's time", FITS, sizes={"time": "40"})],
        partition="MaxTime=30",
        qos="Flags=PartitionTimeLimit",
    ),
    # ---- nodes ----
    Scene(
        [Situation("all nodes empty", FITS, sizes={"nodes": "2", "gpus": "2"})],
        nodes=2,
    ),
    Scene(
        [
            Situation("one node drained, two wanted", WAITS, "Nodes", "NODES=1", sizes=TWO),
            Situation("one node drained, one wanted", FITS),
        ],
        nodes=2,
        drained=1,
    ),
    Scene([Situation("all drained", WAITS, "Nodes", "")], nodes=2, drained=2),
    Scene(
        [Situation("one node down, two wanted", WAITS, "Nodes", "NODES=1", sizes=TWO)],
        nodes=2,
        lost=1,
    ),
    Scene(
        [Situation("full", WAITS, "Resources", "")],
        nodes=2,
        running=[{"nodes": "2", "gpus": "2"}],
    ),
    Scene(
        [Situation("half of it full, two nodes wanted", WAITS, "Resources", "NODES=1", sizes=TWO)],
        nodes=2,
        running=[LARGE],
    ),
    Scene([Situation("half of a node free", FITS, sizes=TWO)], nodes=2, running=[TWO]),
    # ---- reservations ----
    Scene(
        [Situation("all reserved for another", WAITS, "Reservation", "")],
        nodes=1,
        reserved="taken users=root starttime=now",
    ),
    Scene(
        [
            Situation(
                "reserved for me, and asked for", FITS, variables={"SBATCH_RESERVATION": "mine"}
            )
        ],
        nodes=2,
        reserved="mine users=USER starttime=now",
    ),
    Scene(
        [
            Situation(
                "a maintenance before the end", WAITS, "Reservation", sizes={"time": "2:00:00"}
            ),
            Situation("over before the maintenance", FITS, sizes={"time": "20"}),
        ],
        nodes=1,
        reserved="service users=root starttime=now+60minutes flags=maint",
    ),
    Scene(
        [
            Situation(
                "a reservation that is not there",
                NEVER,
                "Reservation",
                variables={"SBATCH_RESERVATION": "nothing"},
            )
        ]
    ),
    # ---- others ----
    Scene(
        [
            Situation(
                "a job ahead of it in the queue, for which nodes are kept",
                WAITS,
                "Priority",
                sizes={"time": "3:00:00"},
            )
        ],
        nodes=2,
        **IN_LINE,
    ),
    Scene(
        [Situation("a short job beside one that waits", FITS, sizes={"time": "5"})],
        nodes=2,
        **IN_LINE,
    ),
]


# ---- the ground -----------------------------------------------------------------------------

# Why a job waits that starts as soon as others end or nodes come back.
FOR_NOW = "Resources|Priority|ReqNodeNotAvail|Nodes.required|Reservation|.*Limit|Assoc|QOS|Max"
ASKED = {"num_nodes": 1, "gpus_per_node": 1, "time": "10"}


@dataclass(frozen=True)
class Place:
    """Where a scene is: its nodes, and the name of all else that it has to itself."""

    scene: Scene
    name: str
    nodes: list[str]

    def site(self, **values: Any) -> Site:
        """Return the site as it is here, some of whose settings are others."""
        account = self.name if self.scene.has_account else ""
        here = {"partition": self.name, "account": account}
        return replace(PRIVATE, slurm=replace(PRIVATE.slurm, **here | values))

    def commands(self, user: str) -> Iterator[list[str]]:
        """Return what makes it as the scene wants it, for jobs of this user."""
        scene, name = self.scene, self.name
        add = ["sacctmgr", "--immediate", "add"]
        of_partition = [f"PartitionName={name}", f"Nodes={','.join(self.nodes)}"]
        if scene.partition_qos:
            yield [*add, "qos", f"{name}-partition", *scene.partition_qos.split()]
            of_partition.append(f"QOS={name}-partition")
        yield ["scontrol", "create", *of_partition, *scene.partition.split()]
        if scene.qos:
            yield [*add, "qos", name, *scene.qos.split()]
        if scene.has_account:
            default = name if scene.qos else "normal"
            of_user = [f"qos=normal,short,urgent,{default}", f"defaultqos={default}"]
            yield [*add, "account", name, *scene.account.split()]
            yield [*add, "user", user, f"account={name}", *of_user, *scene.user.split()]
        for node in self.nodes[len(self.nodes) - scene.drained :]:
            words = [f"NodeName={node}", "State=DRAIN", "Reason=a test State=IDLE"]
            yield ["scontrol", "update", *words]
        if scene.reserved:
            kept, *words = scene.reserved.replace("USER", user).split()
            words += [f"nodes={self.nodes[-1]}", "duration=60"]
            yield ["scontrol", "create", f"reservation={kept}", *words]

    def remedies(self) -> Iterator[list[str]]:
        """Return what ends all that has jobs wait here, except for other jobs."""
        scene, name = self.scene, self.name
        modify = ["sacctmgr", "--immediate", "modify"]
        for what, those in (("qos", scene.qos), ("account", scene.account), ("user", scene.user)):
            if those:
                lifted = [f"{limit.rpartition('=')[0]}=-1" for limit in those.split()]
                where = [name] if what != "user" else ["where", f"account={name}"]
                yield [*modify, what, *where, "set", *lifted]
        for node in self.nodes[len(self.nodes) - scene.drained :]:
            yield ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
        if scene.reserved:
            yield ["scontrol", "delete", f"reservation={scene.reserved.split()[0]}"]

    @property
    def lost(self) -> list[str]:
        """The nodes without power."""
        return self.nodes[len(self.nodes) - self.scene.lost :]


def batches() -> list[list[Place]]:
    """Give each scene its place, in the first batch with nodes for it."""
    found: list[list[Place]] = []
    free: list[list[str]] = []
    for number, scene in enumerate(sorted(SCENES, key=lambda scene: scene.nodes > 0)):
        if not any(len(left) >= scene.nodes for left in free):
            found.append([])
            free.append([f"node{i}" for i in range(1, NUM_NODES + 1)])
        batch = next(i for i, left in enumerate(free) if len(left) >= scene.nodes)
        if not scene.nodes and not found[batch]:
            shared, free[batch] = free[batch][:2], free[batch][2:]
        nodes, free[batch] = free[batch][: scene.nodes], free[batch][scene.nodes :]
        found[batch].append(Place(scene, f"scene{number}", nodes or shared))
    return found


@dataclass(frozen=True, kw_only=True)
class Snapshot(Slurm):
    """Slurm, asked for each thing once: all that is judged in it is judged in the same state."""

    answers: dict[tuple[str, ...], str] = field(default_factory=dict)

    def call(self, *command: str, **options: Any) -> str:
        if command[0] == "sbatch":
            return super().call(*command, **options)
        if command not in self.answers:
            self.answers[command] = super().call(*command, **options)
        return self.answers[command]


@dataclass(frozen=True)
class Outcome:
    """What was said of a job, and what Slurm did with it."""

    answer: verdict.Answer
    job: str
    state: str
    reason: str
    """Why it waits, or was refused."""
    state_afterwards: str
    """When nothing hindered it any more."""

    def __str__(self) -> str:
        return f"{self.answer}\nSlurm: {self.state} {self.reason}, then {self.state_afterwards}"


@dataclass(frozen=True)
class Ground:
    """A cluster on which scenes are set up, and the user whose jobs are judged."""

    cluster: Cluster
    user: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """How the user has Slurm."""
        return (str(LOCAL / "exec.sh"), "--user", self.user, "--")

    def request(self, site: Site, **sizes: str) -> Request:
        return resolve_request(
            site, Sizes(**sizes), asked=ASKED, origin="the situation", on_cpu=False
        )

    def submit(self, site: Site, **sizes: str) -> tuple[str, str]:
        """Queue the job for real; return its number, or how sbatch refuses it."""
        words = sbatch_command(site, self.request(site, **sizes), name="s", folder=Path("/tmp"))
        words += ["--output=/dev/null", "--wrap", "exec sleep 3000"]
        passed = {key: os.environ[key] for key in ("SBATCH_RESERVATION",) if key in os.environ}
        done = self.cluster.run(*words, user=self.user, environment=passed)
        return (done.stdout.strip(), "") if done.returncode == 0 else ("", done.stderr.strip())

    def occupy(self, site: Site, **sizes: str) -> str:
        """Queue a job that has to be taken."""
        job, refusal = self.submit(site, **sizes)
        assert job, refusal
        return job

    def look(self, jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Return the state of each of these jobs, and why it waits."""
        asked = ("--noheader", "--states=all", f"--jobs={','.join(jobs)}", "-o", "%i|%T|%r")
        lines = self.cluster.output("squeue", *asked).splitlines() if jobs else []
        return {job: (state, reason) for job, state, reason in (x.split("|", 2) for x in lines)}

    def wait_for(self, state: str, jobs: Sequence[str]) -> None:
        """Wait until these jobs have come to this state."""
        wait_until(
            lambda: all(found == state for found, _ in self.look(jobs).values()),
            f"{state}: {jobs}",
            so_far=self.cluster.queue,
        )

    def do(self, commands: Iterable[list[str]]) -> None:
        """Run commands as who owns the cluster, one after the other, until one fails."""
        self.cluster.output("bash", "-ec", "\n".join(map(shlex.join, commands)))

    def set_up(self, places: list[Place]) -> None:
        """Make each place as its scene wants it."""
        self.do(words for place in places for words in place.commands(self.user))
        for node in (node for place in places for node in place.lost):
            self.cluster.drill("power-off", node)
            # Slurm would notice by itself, after a while.
            self.do([["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost"]])
        self.wait_for(
            "RUNNING", [self.occupy(p.site(), **x) for p in places for x in p.scene.running]
        )
        planned = [self.occupy(p.site(), **x) for p in places for x in p.scene.waiting]
        layout = ("squeue", "--noheader", f"--jobs={','.join(planned)}", "--Format=SchedNodes")
        wait_until(
            lambda: not planned or self.cluster.output(*layout).count("node") == len(planned),
            f"a plan for {planned}",
            so_far=self.cluster.queue,
        )

    def end(self, *, but: Sequence[str] = ()) -> None:
        """End all jobs but these."""

        def others() -> set[str]:
            return set(self.cluster.output("squeue", "--noheader", "-o", "%i").split()) - set(but)

        if found := others():
            self.do([["scancel", *found]])
        wait_until(lambda: not others(), "the end of the jobs", so_far=self.cluster.queue)

    def release(self, places: list[Place], kept: list[str]) -> None:
        """End all that has these jobs wait: every other job, limits, reservations, lost nodes."""
        self.end(but=kept)
        self.do(words for place in places for words in place.remedies())
        for node in (node for place in places for node in place.lost):
            self.cluster.drill("power-on", node)

    def empty(self) -> None:
        """End all jobs, and wait until all nodes are idle and answer."""
        self.end()
        wait_until(
            # A * is behind the state of a node that does not answer.
            lambda: set(self.cluster.output("sinfo", "--noheader", "-o", "%T").split()) == {"idle"},
            "all nodes are idle",
            so_far=self.cluster.queue,
        )


@pytest.fixture(scope="module")
def ground(cluster: Cluster) -> Iterator[Ground]:
    made = Ground(cluster, cluster.users[0] if cluster.users else getpass.getuser())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(CHECKOUT)
        patch.setattr(limits, "user_name", lambda: made.user)
        for name in ("SBATCH_ACCOUNT", "SBATCH_RESERVATION", "SLUICE_CLUSTER_INSIDE"):
            patch.delenv(name, raising=False)
        patch.setenv("SLUICE_CLUSTER", str(cluster.folder))
        yield made


@pytest.fixture
def clean(ground: Ground) -> Iterator[Ground]:
    ground.empty()
    yield ground
    ground.empty()


# ---- situations, judged and tried -----------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(ground: Ground) -> dict[str, Outcome]:
    """Return what became of each situation, by its name."""
    found: dict[str, Outcome] = {}
    for places in batches():
        ground.set_up(places)
        found |= outcomes_of(places, ground)
        ground.empty()
    return found


def outcomes_of(places: list[Place], ground: Ground) -> dict[str, Outcome]:
    jobs = [(place.site(**x.site), x) for place in places for x in place.scene.situations]
    snapshot = Snapshot(prefix=ground.prefix)
    answers, ids, refusals = {}, {}, {}
    with pytest.MonkeyPatch.context() as patch:

        def as_in(situation: Situation) -> None:
            patch.delenv("SBATCH_RESERVATION", raising=False)
            for name, value in situation.variables.items():
                patch.setenv(name, value)

        for site, situation in jobs:
            as_in(situation)
            wanted = ground.request(site, **situation.sizes)
            answers[situation.name] = verdict.on(snapshot, site, wanted, "situation")
        for site, situation in jobs:
            as_in(situation)
            job, refusals[situation.name] = ground.submit(site, **situation.sizes)
            if job:
                ids[situation.name] = job
    queued = list(ids.values())
    # Beside one that waits, a job starts at the next turn of the scheduler.
    starting = {ids.get(name, "") for name, answer in answers.items() if answer.verdict is FITS}
    states: dict[str, tuple[str, str]] = {}

    def are_settled() -> bool:
        nonlocal states
        states = ground.look(queued)
        return all(
            state == "RUNNING" if job in starting else is_looked_at(state, reason)
            for job, (state, reason) in states.items()
        )

    # Which one is not as it should be, the tests tell.
    with suppress(AssertionError):
        wait_until(are_settled, "all jobs are looked at, or run")
    kept = [job for name, job in ids.items() if answers[name].verdict is WAITS]
    ground.release(places, kept)
    with suppress(AssertionError):
        ground.wait_for("RUNNING", kept)
    afterwards = ground.look(queued)
    return {
        name: Outcome(
            answer,
            ids.get(name, ""),
            *states.get(ids.get(name, ""), ("REFUSED", refusals[name])),
            afterwards.get(ids.get(name, ""), ("", ""))[0],
        )
        for name, answer in answers.items()
    }


def is_looked_at(state: str, reason: str) -> bool:
    """Return whether Slurm has made up its mind about a job."""
    return state != "CONFIGURING" and (state, reason) != ("PENDING", "None")


@pytest.mark.parametrize("situation", [x for scene in SCENES for x in scene.situations], ids=str)
def test_the_verdict_is_what_slurm_then_does(
    outcomes: dict[str, Outcome], situation: Situation
) -> None:
    found = outcomes[situation.name]
    answer = found.answer
    assert answer.verdict == situation.verdict, found
    limits = [finding.limit for finding in answer.findings]
    assert limits[:1] == ([situation.limit] if situation.limit else []), found
    if situation.fits_with is not None:
        assert answer.findings[0].fits_with == situation.fits_with, found
    if answer.verdict is FITS:
        assert found.state == "RUNNING", found
    elif answer.verdict is NEVER:
        assert found.state in ("REFUSED", "PENDING"), found
        assert found.reason not in ("Resources", "Priority", "None"), found
    elif found.state == "REFUSED":
        assert situation.limit.startswith("MaxSubmit"), found
        assert re.search("(?i)submit|policy", found.reason), found
    else:
        assert found.state == "PENDING", found
        assert re.match(FOR_NOW, found.reason), found
        # What had to wait starts as soon as nothing hinders it.
        assert found.state_afterwards == "RUNNING", found


# ---- accounting that is hidden, the command, the overview -----------------------------------


class Mute(Slurm):
    """A Slurm whose accounting is hidden: sacctmgr shows nothing, and calls that a success."""

    def call(self, *command: str, **options: Any) -> str:
        return "" if command[0] == "sacctmgr" else super().call(*command, **options)


@contextmanager
def limited(ground: Ground, what: Sequence[str], limit: str) -> Iterator[None]:
    """Set a limit of a QOS or an association, for as long as it takes."""
    modify = ["sacctmgr", "--immediate", "modify", *what, "set"]
    ground.do([[*modify, limit]])
    yield
    ground.do([[*modify, f"{limit.rpartition('=')[0]}=-1"]])


def test_where_sacctmgr_shows_nothing_the_controller_is_believed(clean: Ground) -> None:
    queue = Mute(prefix=clean.prefix)

    def judge() -> verdict.Answer:
        return verdict.on(queue, PRIVATE, clean.request(PRIVATE), "situation")

    answer = judge()
    assert answer.verdict is FITS
    assert any("sacctmgr shows no association" in remark for remark in answer.remarks)
    clean.wait_for("RUNNING", [clean.occupy(PRIVATE)])
    me = ("user", "where", f"name={clean.user}", "account=research")
    with limited(clean, me, "MaxJobs=1"):
        assert [finding.limit for finding in judge().findings] == ["MaxJobs"]
        job = clean.occupy(PRIVATE)
        wait_until(lambda: is_looked_at(*clean.look([job])[job]), "the job is looked at")
        assert clean.look([job])[job] == ("PENDING", "AssocMaxJobsLimit")


def on_this_machine(cluster: Cluster, *words: str) -> Result:
    """Run a command as on the machine that holds the cluster."""
    return waiting.run(words, cwd=CHECKOUT, env=cluster.environment | {"VENV": sys.prefix})


def test_exit_codes_of_the_command_and_of_make(
    clean: Ground, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def content(*words: str) -> dict[str, Any]:
        code = check.main(["--job=tinyllama", "--format=json", *words])
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert (code, said["version"]) == (said["verdict"], 1)
        return said

    fits = content("--time=10")
    assert (fits["verdict"], fits["request"]["time"]) == (0, "10")
    never = content(f"--nodes={NUM_NODES + 1}")
    assert (never["verdict"], never["findings"][0]["fits_with"]) == (2, f"NODES={NUM_NODES}")
    make = ("make", "--no-print-directory", "check", "JOB=tinyllama")
    done = on_this_machine(clean.cluster, *make, "GPUS=3")
    assert done.returncode == 2
    assert "can never run" in done.stdout
    clean.wait_for("RUNNING", [clean.occupy(PRIVATE, nodes=str(NUM_NODES), gpus="2")])
    command = (sys.executable, "-m", "cluster", "check", "--job=tinyllama")
    done = on_this_machine(clean.cluster, *command)
    assert done.returncode == 1
    # Before midnight with the day: Tue 00:04.
    assert re.search(r"will wait, expected start [\w: -]+\d", done.stdout)
    # Only what can never be is a failure to make.
    done = on_this_machine(clean.cluster, *make)
    assert (done.returncode, done.stderr) == (0, "")
    assert "will wait" in done.stdout
    # No answer is no verdict.
    monkeypatch.setenv("SLUICE_CLUSTER", "/nowhere")
    with pytest.raises(UserError, match="make cluster-up"):
        check.main(["--job=tinyllama"])


def test_a_site_file_is_compared_with_slurm_and_a_file_corrected_as_told_is_right(
    cluster: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "site.toml"
    wrong = {"partition": "gpux", "cpus_per_node": 9, "gpus_per_node": 3, "gpu_type": "a100"}
    wrong |= {"account": "physics", "save_s": 50000}
    lines = {key: f"{key} = {json.dumps(value)}" for key, value in wrong.items()}
    words = (sys.executable, "-m", "cluster", "check-site")

    def faults() -> list[str]:
        path.write_text("\n".join(["[slurm]", *lines.values(), '[paths]\nscratch = "/var/tmp"']))
        done = cluster.run(*words, cwd=CHECKOUT, environment={"SLUICE_SITE": str(path)})
        assert done.returncode == (2 if done.stderr else 0), done.stderr
        return done.stderr.splitlines()

    (fault,) = faults()
    assert fault.endswith("slurm.partition 'gpux': there is no such partition; did you mean 'gpu'?")
    lines["partition"] = 'partition = "gpu"'
    told = faults()
    assert len(told) == len(wrong) - 1, told
    for fault in told:
        correction = fault.partition("; write slurm.")[2]
        lines[correction.split(" ")[0]] = correction
    assert faults() == []
    # What only sbatch knows.
    lines["sbatch_flags"] = 'sbatch_flags = ["--no-such-option=1"]'
    (fault,) = faults()
    assert "sbatch refuses a job with these settings: unrecognized option" in fault


def test_the_overview_tells_what_there_is(clean: Ground) -> None:
    clean.wait_for("RUNNING", [clean.occupy(PRIVATE, gpus="1")])
    with limited(clean, ("qos", "normal"), "MaxTRESPU=gres/gpu=3"):
        facts = overview.facts(Slurm(prefix=clean.prefix))
        done = on_this_machine(clean.cluster, "make", "--no-print-directory", "check")
    (gpu,) = [one for one in facts["partitions"] if one["name"] == "gpu"]
    cpus, gpus, nodes = 4 * NUM_NODES, 2 * NUM_NODES, NUM_NODES - 1
    assert (gpu["free_cpus"], gpu["whole_free_nodes"]) == (cpus - 2, nodes)
    assert gpu["gpus"] == [{"type": None, "free": gpus - 1, "total": gpus}]
    assert [job["state"] for job in facts["jobs"]] == ["RUNNING"]
    (used,) = [q["limits"] for q in facts["qos"] if q["name"] == "normal"]
    assert [(one["name"], one["limit"], one["used"]) for one in used] == [("MaxTRESPU", 3, 1)]
    assert "research" in [one["account"] for one in facts["fair_share"]]
    assert "research" in [one["account"] for one in facts["associations"]]
    assert done.returncode == 0, done.stderr
    row = rf"(?m)^gpu\* +UP +1-00:00:00 +{NUM_NODES} +1-{NUM_NODES} +{nodes} "
    assert re.search(rf"{row}+{cpus - 2} of {cpus} +{gpus - 1} of {gpus}", done.stdout)
