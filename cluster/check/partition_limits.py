"""Which jobs a partition would never run: sizes, times, nodes, and who may use it."""

from __future__ import annotations

import grp
import os
from collections.abc import Iterator

from cluster.check.choice import Choice
from cluster.check.demand import Demand
from cluster.check.finding import Finding, Verdict, never, over_time
from cluster.plan.request import Request
from cluster.slurm.associations import Qos
from cluster.slurm.partitions import Partition
from runfolder.errors import printable


def over_access(partition: Partition, chosen: Choice, user: str) -> Iterator[Finding]:
    where = f"{chosen.where}: slurm.partition '{partition.name}'"
    whose = f"partition {partition.name}"
    if partition.state not in ("UP", "unknown"):
        message = f"{where}: is {printable(partition.state)}; choose another, or ask the site"
        yield never(message, "State", whose)
    is_root = user == "root"
    if partition.is_for_root and not is_root:
        yield never(f"{where}: only root may use it; choose another", "RootOnly", whose)
    if partition.wants_reservation and not chosen.reservation:
        message = f"{where}: accepts only jobs with a reservation; set SBATCH_RESERVATION"
        yield never(message, "ReqResv", whose)
    if partition.allowed_groups is not None and not is_root:
        mine = _groups(user)
        if mine is not None and not mine & set(partition.allowed_groups):
            groups = ", ".join(partition.allowed_groups)
            yield never(f"{where}: only the groups {groups} may use it", "AllowGroups", whose)


def _groups(user: str) -> set[str] | None:
    names = set()
    try:
        for number in os.getgrouplist(user, os.getgid()):
            names.add(grp.getgrgid(number).gr_name)
    except (KeyError, OSError):
        return None
    return names


def over_sizes(
    partition: Partition, request: Request, demand: Demand, chosen: Choice, qos: Qos | None
) -> Iterator[Finding]:
    """Find whether the partition ever allows that much, and whether it has such nodes."""
    whose = f"partition {partition.name}"
    # A QOS may exempt its jobs from these limits.
    flags = qos.flags if qos else ()
    most = partition.total_nodes
    if partition.max_nodes is not None and "PartitionMaxNodes" not in flags:
        most = min(most, partition.max_nodes)
    if request.num_nodes > most and "TotalNodes" not in partition.unknown:
        verb = "has" if most == partition.total_nodes else "allows a job at most"
        message = (
            f"NODES={request.num_nodes}: {whose} {verb} {most}; ask for fewer, or another partition"
        )
        yield never(message, "MaxNodes", whose, [str(most)] if most else [], "NODES")
    if request.num_nodes < partition.min_nodes and "PartitionMinNodes" not in flags:
        message = (
            f"NODES={request.num_nodes}: {whose} requires at least {partition.min_nodes}; ask "
            "for more, or another partition"
        )
        yield never(message, "MinNodes", whose, [str(partition.min_nodes)], "NODES")
    if "PartitionTimeLimit" not in flags and (
        over := over_time(request, partition.max_time, whose, "MaxTime")
    ):
        yield over
    if (cpus := partition.max_cpus_per_node) is not None and demand.cpus > cpus:
        message = (
            f"a job asks for {demand.cpus} CPUs per node, and {whose} allows at most {cpus}; set "
            "slurm.cpus_per_node to that"
        )
        yield never(message, "MaxCPUsPerNode", whose, [str(cpus)], "slurm.cpus_per_node")
    memory = partition.max_memory_per_node_mb
    if memory is not None and request.memory_per_node_mb > memory:
        message = (
            f"a job asks for {request.memory_per_node_mb} MB per node, and {whose} allows at most "
            f"{memory}; set slurm.memory_per_node_mb to that"
        )
        yield never(message, "MaxMemPerNode", whose, [str(memory)], "slurm.memory_per_node_mb")
    fitting = demand.fitting
    if fitting is not None and len(fitting) < request.num_nodes <= most:
        yield _too_large(partition, request, demand, chosen, len(fitting))


def _too_large(
    partition: Partition, request: Request, demand: Demand, chosen: Choice, fitting: int
) -> Finding:
    many = f"{fitting} of its nodes can" if fitting else "none of its nodes can"
    message = f"partition {partition.name}: {many} provide what the job asks for per node: {demand}"
    flags = {
        "constraint": chosen.constraint,
        "nodelist": chosen.nodelist,
        "exclude": chosen.exclude,
    }
    if given := " ".join(f"--{name}={value}" for name, value in flags.items() if value):
        message += f", with {given} of slurm.sbatch_flags in {chosen.where}"
    fits_with = ""
    if fitting:
        fits_with = f"NODES={fitting}"
    elif demand.most_gpus is not None and request.gpus_per_node > demand.most_gpus:
        fits_with = f"GPUS={demand.most_gpus}"
    elif demand.most_cpus and demand.cpus > demand.most_cpus:
        fits_with = f"slurm.cpus_per_node = {demand.most_cpus}"
    elif demand.most_memory_mb and request.memory_per_node_mb > demand.most_memory_mb:
        fits_with = f"slurm.memory_per_node_mb = {demand.most_memory_mb}"
    return Finding(
        verdict=Verdict.NEVER,
        limit="Nodes",
        whose=f"partition {partition.name}",
        message=message,
        fits_with=fits_with,
    )


def over_closure(partition: Partition, chosen: Choice, account: str, qos: str) -> Iterator[Finding]:
    where = f"{chosen.where}: slurm.partition '{partition.name}'"
    for kind, name, allowed, denied, limit in (
        ("account", account, partition.allowed_accounts, partition.denied_accounts, "Accounts"),
        ("QOS", qos, partition.allowed_qos, partition.denied_qos, "Qos"),
    ):
        if name and allowed is not None and name not in allowed:
            message = f"{where}: is closed to {kind} {name}; open to {', '.join(allowed)}"
            setting = f"slurm.{kind.lower()}"
            yield never(message, f"Allow{limit}", f"partition {partition.name}", allowed, setting)
        elif name and name in denied:
            message = f"{where}: is closed to {kind} {name}; choose another"
            yield never(message, f"Deny{limit}", f"partition {partition.name}")
