"""The partitions: their state, what they give to a job, and who may use them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.slurm.call import Slurm
from cluster.slurm.notation import fields_of, number

# What every release shows, and its format: a limit that cannot be read is not the same as none.
READABLE = {
    "State": re.compile("UP|DOWN|DRAIN|INACTIVE"),
    "TotalNodes": re.compile(r"\d{1,15}"),
    "MaxNodes": re.compile(r"\d{1,15}|UNLIMITED"),
    "MaxTime": re.compile(r"(\d+-)?\d+(:\d\d){0,2}|UNLIMITED|INFINITE"),
    "AllowGroups": re.compile(".+"),
}


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What scontrol says about a partition."""

    name: str
    state: str
    """UP, DOWN, DRAIN, INACTIVE; "unknown"."""
    is_default: bool
    total_nodes: int
    min_nodes: int
    max_nodes: int | None
    """None: as many as there are."""
    max_time: str
    """UNLIMITED, [days-]hours:minutes:seconds; "unknown"."""
    allowed_accounts: list[str] | None
    denied_accounts: list[str]
    allowed_qos: list[str] | None
    denied_qos: list[str]
    allowed_groups: list[str] | None
    """None: all."""
    qos: str
    """Its own QOS, whose limits apply to every job in it; empty without one."""
    max_cpus_per_node: int | None
    max_memory_per_node_mb: int | None
    memory_per_cpu_mb: int | None
    memory_per_node_mb: int | None
    memory_per_gpu_mb: int | None
    """What a job gets that asks for no memory; the last, if set, applies to jobs with GPUs."""
    max_memory_per_cpu_mb: int | None
    """A job that asks for more gets more CPUs."""
    selects: str
    """Its own SelectTypeParameters; empty: the cluster's."""
    gives_whole_nodes: bool
    wants_reservation: bool
    is_for_root: bool
    unknown: tuple[str, ...]
    """What Slurm does not show."""


def read(queue: Slurm) -> dict[str, Partition]:
    """Ask Slurm for the partitions that we may see.

    Raises:
        SlurmError: it does not show them.
    """
    return parse(queue.call("scontrol", "--oneliner", "show", "partition"))


def parse(shown: str) -> dict[str, Partition]:
    """Return the partitions in scontrol's output; other lines are left out."""
    found = {}
    for line in shown.splitlines():
        shows = fields_of(line)
        if name := shows.get("PartitionName", "").split(" ")[0]:
            found[name] = _partition(name, shows)
    return found


def _partition(name: str, shows: Mapping[str, str]) -> Partition:
    def names(key: str) -> list[str] | None:
        value = shows.get(key, "ALL")
        return None if value in ("ALL", "N/A", "(null)", "") else value.split(",")

    untold = _untold(shows)
    return Partition(
        name=name,
        state="unknown" if "State" in untold else shows["State"],
        is_default=shows.get("Default") == "YES",
        total_nodes=number(shows, "TotalNodes") or 0,
        min_nodes=number(shows, "MinNodes") or 0,
        max_nodes=number(shows, "MaxNodes"),
        max_time="unknown" if "MaxTime" in untold else shows["MaxTime"],
        allowed_accounts=names("AllowAccounts"),
        denied_accounts=names("DenyAccounts") or [],
        allowed_qos=names("AllowQos"),
        denied_qos=names("DenyQos") or [],
        allowed_groups=names("AllowGroups"),
        qos=next(iter(names("QoS") or []), ""),
        max_cpus_per_node=number(shows, "MaxCPUsPerNode"),
        max_memory_per_node_mb=number(shows, "MaxMemPerNode"),
        memory_per_cpu_mb=number(shows, "DefMemPerCPU"),
        memory_per_node_mb=number(shows, "DefMemPerNode"),
        memory_per_gpu_mb=memory_per_gpu(shows),
        max_memory_per_cpu_mb=number(shows, "MaxMemPerCPU"),
        selects=shows.get("SelectTypeParameters", "NONE").upper().replace("NONE", ""),
        # The second since 26.05.
        gives_whole_nodes=shows.get("OverSubscribe", "").startswith("EXCLUSIVE")
        or shows.get("Exclusive") in ("YES", "NODE"),
        wants_reservation=shows.get("ReqResv") == "YES",
        is_for_root=shows.get("RootOnly") == "YES",
        unknown=untold,
    )


def memory_per_gpu(shows: Mapping[str, str]) -> int | None:
    """Return DefMemPerGPU of a partition, or of the cluster, in MB: among its JobDefaults."""
    found = re.search(r"(?:^|,)DefMemPerGPU=(\d{1,15})(?:,|$)", shows.get("JobDefaults", ""))
    return int(found[1]) if found else None


def _untold(shows: Mapping[str, str]) -> tuple[str, ...]:
    missing = [key for key, form in READABLE.items() if not form.fullmatch(shows.get(key, ""))]
    # It says who is allowed, or who is denied.
    missing += [
        f"Allow{what}"
        for what in ("Accounts", "Qos")
        if not shows.get(f"Allow{what}") and not shows.get(f"Deny{what}")
    ]
    return tuple(missing)
