"""limits.py, bounds.py, choice.py, room.py: the rules that the private cluster does not show."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from cluster.check import bounds, limits, room, verdict
from cluster.check.bounds import Holders
from cluster.check.choice import Choice
from cluster.check.demand import Demand, demand_of
from cluster.check.finding import Finding, Verdict
from cluster.check.limits import Rules
from cluster.plan.request import Request
from cluster.site.settings import PRIVATE
from cluster.slurm import nodes, partitions, reservations
from cluster.slurm.associations import Accounting, Association, Bound, Holder
from cluster.slurm.refusals import Trial

REQUEST = Request(
    num_nodes=2,
    gpus_per_node=2,
    processes_per_node=2,
    time="1:00:00",
    cpus_per_node=4,
    memory_per_node_mb=0,
    device="cpu",
)
PARTITION = (
    "PartitionName=gpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL QoS=N/A MaxNodes=UNLIMITED "
    "MaxTime=1-00:00:00 MinNodes=0 State=UP TotalNodes=2 OverSubscribe=NO"
)
NODE = "NodeName=node{} CPUAlloc=0 CPUEfctv=8 CPUTot=8 {} RealMemory=8000 AllocMem=0 State={} "
NODE += "ThreadsPerCore={} Partitions=gpu"
CONFIG = {"SelectType": "select/cons_tres", "SelectTypeParameters": "CR_CORE_MEMORY"}


def known(gres: str = "Gres=gpu:2 GresUsed=gpu:0", state: str = "IDLE", threads: int = 1) -> Any:
    lines = [NODE.format(number, gres, state, threads) for number in (1, 2)]
    return nodes.parse("\n".join(lines))


def demand(
    request: Request = REQUEST, partition: str = PARTITION, flags: tuple[str, ...] = (), **had: Any
) -> Demand:
    site = replace(PRIVATE, slurm=replace(PRIVATE.slurm, sbatch_flags=list(flags)))
    (of_it,) = partitions.parse(partition).values()
    config = CONFIG | {"DefMemPerCPU": "500"}
    return demand_of(request, of_it, Choice.from_site(site), config, known(**had))


def over(
    name: str, limit: int, used: int | None, *, safe: bool = False, kind: str = "gres/gpu"
) -> list[Finding]:
    bound = Bound(whose="account a", name=name, tres=kind, limit=limit, text=str(limit), used=used)
    holder = Holder(whose="account a", bounds={(name, kind): bound})
    holders = Holders(qos=[], association=holder, above=())
    return list(bounds.over_bounds(holders, REQUEST, demand(), safe=safe))


def test_minutes_of_a_group_count_before_a_job_only_where_the_site_says_safe() -> None:
    # It asks for 4 GPUs x 60 minutes.
    assert over("GrpTRESMins", 240, 0) == []
    (ended,) = over("GrpTRESMins", 239, 0)
    assert (ended.verdict, ended.message.count("0:59:00")) == (Verdict.FITS, 1)
    (used_up,) = over("GrpTRESMins", 239, 239)
    assert used_up.verdict is Verdict.WAITS
    (never,) = over("GrpTRESMins", 239, 0, safe=True)
    assert (never.verdict, never.fits_with) == (Verdict.NEVER, "TIME=0:59:00")
    (waits,) = over("GrpTRESMins", 300, 100, safe=True)
    assert (waits.verdict, waits.fits_with) == (Verdict.WAITS, "TIME=0:50:00")
    (never,) = over("GrpWall", 59, 0, safe=True, kind="")
    assert never.fits_with == "TIME=0:59:00"


def test_use_that_nobody_tells_is_unknown() -> None:
    assert over("GrpTRES", 8, None) == []
    bound = Bound(whose="account a", name="GrpTRES", tres="cpu", limit=8, text="8", used=None)
    holder = Holder(whose="account a", bounds={("GrpTRES", "cpu"): bound})
    association = Association(
        account="a", partition="", qos=("q",), default_qos="q", holder=holder, above=None
    )
    rules = Rules(
        user="ada",
        config=CONFIG,
        partitions=partitions.parse(PARTITION),
        nodes=None,
        accounting=Accounting(
            user="ada", enforced=frozenset({"limits"}), associations=(association,)
        ),
        unknown=("nodes: none shown",),
    )
    remarks = limits.judge(rules, Choice.from_site(PRIVATE), REQUEST).remarks
    assert "unknown: nodes: none shown" in remarks
    assert "unknown: current usage of GrpTRES cpu of account a" in remarks
    assert "unknown: limits of the accounts above a" in remarks
    assert "unknown: which QOS the job gets, and that QOS's limits" in remarks


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--account=a", "-p", "long"], {"account": "a", "partition": "long"}),
        (["-Aa", "-qhigh"], {"account": "a", "qos": "high"}),
        (["--qos", "high", "--exclusive"], {"qos": "high", "is_exclusive": True}),
        (["--reservation=kept", "--mail-type=END"], {"reservation": "kept"}),
        (["--licenses=matlab"], {"not_reckoned_with": ["--licenses"]}),
        (["-C", "a100&ib"], {"constraint": "a100&ib"}),
    ],
)
def test_what_the_flags_of_a_site_choose(flags: list[str], expected: dict[str, Any]) -> None:
    chosen = Choice.from_site(replace(PRIVATE, slurm=replace(PRIVATE.slurm, sbatch_flags=flags)))
    assert {key: getattr(chosen, key) for key in expected} == expected


def test_a_constraint_that_is_not_understood_is_unknown() -> None:
    of_it = demand(flags=("--constraint=[a*2&b]",))
    assert of_it.fitting is None
    assert of_it.unknown == ["unknown: which nodes --constraint=[a*2&b] matches"]


def test_cores_are_given_out_with_their_threads_and_nodes_whole() -> None:
    odd = replace(REQUEST, cpus_per_node=3)
    assert demand(odd, threads=2).cpus == 4
    whole = demand(odd, PARTITION.replace("OverSubscribe=NO", "OverSubscribe=EXCLUSIVE"))
    assert (whole.cpus, whole.whole_nodes) == (8, True)


@pytest.mark.parametrize(
    ("state", "word", "in_service"),
    [
        ("IDLE", "idle", True),
        ("MIXED+PLANNED", "mixed", True),
        ("IDLE+DRAIN", "drained", False),
        ("MIXED+DRAIN", "drained", False),
        ("IDLE*", "down", False),
        ("DOWN*+DRAIN", "down", False),
        ("IDLE+MAINTENANCE+RESERVED", "maintenance", False),
        ("IDLE+RESERVED", "reserved", False),
        ("IDLE+POWERED_DOWN", "powered down", True),
        ("IDLE~", "powered down", True),
        ("ALLOCATED", "allocated", True),
        ("IDLE+COMPLETING", "completing", True),
        ("SOMETHING_NEW", "unknown", False),
        ("UNKNOWN+DRAIN+INVALID_REG", "down", False),
    ],
)
def test_real_states(state: str, word: str, in_service: bool) -> None:
    node = known(state=state)["node1"]
    assert (node.state, node.is_in_service) == (word, in_service)
    assert bool(node.cpus_free) == in_service


@pytest.mark.parametrize(
    ("gres", "free"),
    [
        ("Gres=gpu:2 GresUsed=gpu:(null):1(IDX:0)", {"": (2, 4)}),
        ("Gres=gpu:a100:4(S:0-1) GresUsed=gpu:a100:1(IDX:0,2)", {"a100": (6, 8)}),
        (
            "Gres=gpu:a:2(S:0),gpu:b:1,shard:8 GresUsed=gpu:a:1(IDX:0),gpu:b:0(IDX:N/A),shard:0",
            {"a": (2, 4), "b": (2, 2)},
        ),
        ("Gres=gpu:a:2,gpu:b:1", {"a": (None, 4), "b": (None, 2)}),
        ("Gres=gpu:2 CfgTRES=cpu=8,gres/gpu=2 AllocTRES=cpu=1,gres/gpu=2", {"": (0, 4)}),
        ("Gres=gpu:2", {"": (None, 4)}),
        ("Gres=(null)", {}),
    ],
)
def test_free_gpus_by_type(gres: str, free: dict[str, tuple[int | None, int]]) -> None:
    assert nodes.free_gpus(known(gres).values()) == free


def test_a_reason_cannot_pass_for_a_state() -> None:
    line = NODE.format(1, "Gres=(null)", "DOWN", 1) + " Reason=x State=IDLE CPUAlloc=0 [root]"
    (node,) = nodes.parse(line).values()
    assert (node.state, node.reason) == ("down", "x")


NOW = time.mktime((2026, 11, 23, 12, 0, 0, 0, 0, -1))


def look(of_it: Demand, kept: str = "", waiting: tuple[room.Waiting, ...] = ()) -> list[Finding]:
    return list(
        room.look(
            *(of_it, known(), Choice.from_site(PRIVATE), reservations.parse(kept)),
            *(waiting, "ada", "research"),
            now=NOW,
        )
    )


def test_a_reservation_of_some_cores_leaves_the_rest() -> None:
    def at(seconds: int) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(NOW + seconds))

    whole = f"ReservationName=a StartTime={at(1800)} EndTime={at(7200)} Nodes=node[1-2] "
    (waits,) = look(demand(), whole + "CoreCnt=16 Users=root")
    assert (waits.limit, waits.whose) == ("Reservation", "reservation a")
    # Slurm keeps half a minute of the half an hour.
    assert waits.fits_with == "TIME=0:29:00"
    assert look(demand(), whole + "CoreCnt=2 Users=root") == []
    over_soon = f"ReservationName=a StartTime={at(-90)} EndTime={at(-60)} Nodes=node1 CoreCnt=8"
    assert look(demand(), over_soon) == []


def test_whoever_is_next_in_line_and_has_no_plan_yet_is_before_it() -> None:
    first = room.Waiting(job_id="7", reason="Resources", start="N/A", nodes=())
    held = room.Waiting(job_id="8", reason="JobHeldUser", start="N/A", nodes=())
    assert look(demand(), waiting=(held,)) == []
    assert [finding.limit for finding in look(demand(), waiting=(held, first))] == ["Priority"]


@pytest.mark.parametrize(
    ("partition", "config", "gpus", "memory_mb"),
    [
        # As Slurm 22.05 gave it to 1 node with 4 CPUs: tests/real/cluster/commands/test_check.py.
        ("", {"DefMemPerCPU": "500"}, 2, 2000),
        ("DefMemPerCPU=700", {"DefMemPerCPU": "500"}, 2, 2800),
        ("DefMemPerNode=3000", {"DefMemPerCPU": "500"}, 2, 3000),
        ("JobDefaults=DefMemPerGPU=1000", {"DefMemPerCPU": "500"}, 2, 2000),
        ("JobDefaults=DefMemPerGPU=1000", {"DefMemPerCPU": "500"}, 0, 2000),
        ("JobDefaults=DefCpuPerGPU=1,DefMemPerGPU=900 DefMemPerNode=3000", {}, 2, 1800),
        ("JobDefaults=DefCpuPerGPU=1 DefMemPerNode=3000", {}, 2, 3000),
        ("DefMemPerNode=3000", {"JobDefaults": "DefCpuPerGPU=1,DefMemPerGPU=900"}, 2, 1800),
        ("DefMemPerNode=3000", {"JobDefaults": "DefCpuPerGPU=1,DefMemPerGPU=900"}, 0, 3000),
        ("JobDefaults=DefMemPerGPU=1000", {"JobDefaults": "DefMemPerGPU=900"}, 2, 2000),
        ("JobDefaults=(null) DefMemPerNode=UNLIMITED", {"JobDefaults": "(null)"}, 2, None),
    ],
)
def test_the_memory_of_a_job_that_asks_for_none(
    partition: str, config: dict[str, str], gpus: int, memory_mb: int | None
) -> None:
    (of_it,) = partitions.parse(f"{PARTITION} {partition}").values()
    wanted = replace(REQUEST, gpus_per_node=gpus)
    found = demand_of(wanted, of_it, Choice.from_site(PRIVATE), CONFIG | config, known())
    assert found.memory_mb == memory_mb
    # Slurm's own estimate leaves it out unless it is told.
    by_gpu = gpus and "DefMemPerGPU" in partition + str(config)
    assert found.for_trial() == ([f"--mem-per-gpu={(memory_mb or 0) // gpus}M"] if by_gpu else [])


def test_a_partition_may_give_out_cores_without_memory() -> None:
    of_it = demand(partition=f"{PARTITION} SelectTypeParameters=CR_CORE")
    assert (of_it.gives_memory, demand().gives_memory) == (False, True)
    assert demand(partition=f"{PARTITION} SelectTypeParameters=NONE").gives_memory


@pytest.mark.parametrize(("memory_mb", "cpus"), [(1000, 4), (4000, 8), (3999, 8), (0, 4)])
def test_more_memory_than_goes_with_its_cpus_costs_more_of_them(memory_mb: int, cpus: int) -> None:
    wanted = replace(REQUEST, memory_per_node_mb=memory_mb)
    assert demand(wanted, f"{PARTITION} MaxMemPerCPU=500").cpus == cpus


def test_memory_that_a_site_says_itself_is_not_said_again() -> None:
    partition = f"{PARTITION} JobDefaults=DefMemPerGPU=1000"
    assert demand(partition=partition).for_trial() == ["--mem-per-gpu=1000M"]
    assert demand(partition=partition, flags=("--mem=0",)).for_trial() == []
    asked = replace(REQUEST, memory_per_node_mb=10)
    assert demand(asked, partition).for_trial() == []


def test_variables_that_do_not_reach_sbatch_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_ARRAY_INX", "SBATCH_EXPORT", "SBATCH_ACCOUNT", "SBATCH_CLUSTERS"):
        monkeypatch.setenv(name, "x")
    assert Choice.from_site(PRIVATE).ignored == ["SBATCH_ARRAY_INX", "SBATCH_EXPORT"]


NO_NODES = "Requested node configuration is not available"
POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.mark.parametrize(
    ("refused", "found", "expected"),
    [
        (("You must name your project.", "Unspecified error"), "", [Verdict.NEVER]),
        # Whatever else hinders it: sbatch would refuse it for this alone.
        (("You must name your project.", "Unspecified error"), "Resources", [Verdict.NEVER]),
        (("Access/permission denied",), "Resources", [Verdict.NEVER]),
        ((NO_NODES,), "Resources", []),
        # The nodes are free, as far as is known: then it is their kind.
        ((NO_NODES,), "", [Verdict.NEVER]),
        (("Requested nodes are busy",), "", [Verdict.WAITS]),
        # Only sbatch itself says why.
        ((NO_NODES, "Requested nodes are busy"), "", [Verdict.WAITS]),
        (("Requested nodes are busy: try another group.", "Access denied"), "", [Verdict.NEVER]),
        (("Welcome.", POLICY), "", [Verdict.NEVER]),
        (("Welcome.", POLICY), "Resources", [Verdict.NEVER]),
        # That of how many jobs may be queued, which is known to pass.
        (("Welcome.", POLICY), "MaxSubmitJobs", []),
    ],
)
def test_what_sbatch_says_against_a_job_is_for_ever_unless_it_is_of_the_moment(
    refused: tuple[str, ...], found: str, expected: list[Verdict]
) -> None:
    other = Finding(verdict=Verdict.WAITS, limit=found, whose="", message="")
    said = verdict._as_slurm_says(Trial(refused=refused), [other] if found else [], [], [])
    assert [finding.verdict for finding in said] == expected
