"""What a job needs on each node, as Slurm counts it, and which nodes could ever provide that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.check.choice import Choice, features
from cluster.plan.request import Request
from cluster.slurm import hosts, notation
from cluster.slurm.nodes import Node
from cluster.slurm.partitions import Partition, memory_per_gpu


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a job needs on each node, and which nodes have it when nothing else runs."""

    num_nodes: int
    cpus: int
    gpus: int
    gpu_type: str
    memory_mb: int | None
    """None: unknown, or the site does not allocate memory."""
    whole_nodes: bool
    """No other job may share them."""
    whole_memory: bool
    """All memory of them."""
    gives_memory: bool
    """Whether the site allocates memory."""
    minutes: int | None
    """The time limit; None: unlimited."""
    fitting: list[Node] | None
    """None: unknown."""
    most_cpus: int | None = None
    most_gpus: int | None = None
    most_memory_mb: int | None = None
    """What the largest node of the partition has."""
    memory_per_gpu_mb: int | None = None
    """Slurm's default for each GPU, where that applies."""
    unknown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """For messages: 4 CPUs, 2 GPUs (a100), 8000 MB."""
        parts = [f"{self.cpus} CPU{'s' if self.cpus != 1 else ''}"]
        if self.gpus:
            kind = f" ({self.gpu_type})" if self.gpu_type else ""
            parts.append(f"{self.gpus} GPU{'s' if self.gpus != 1 else ''}{kind}")
        if self.whole_memory:
            parts.append("all memory")
        elif self.gives_memory and self.memory_mb:
            parts.append(f"{self.memory_mb} MB")
        return ", ".join(parts) + (", exclusive" if self.whole_nodes else "")

    def for_trial(self) -> list[str]:
        """Return additional options for sbatch --test-only, which ignores this default."""
        each = self.memory_per_gpu_mb
        return [] if each is None else [f"--mem-per-gpu={each}M"]

    def of_all_nodes(self) -> dict[str, int]:
        """Return what the job needs in total, by Slurm's names; memory in MB, if known."""
        each = self.of_a_node()
        return {kind: count * self.num_nodes for kind, count in each.items()} | {
            "node": self.num_nodes
        }

    def of_a_node(self) -> dict[str, int]:
        """Return the same for one node."""
        each = {"cpu": self.cpus, "node": 1}
        if self.gpus:
            each["gres/gpu"] = self.gpus
            if self.gpu_type:
                each[f"gres/gpu:{self.gpu_type}"] = self.gpus
        if self.memory_mb is not None:
            each["mem"] = self.memory_mb
        return each

    def fits_free(self, node: Node) -> bool | None:
        """Return whether the node has it free now; None: unknown."""
        if not node.is_in_service:
            return False
        if self.whole_nodes and (node.cpus_used or node.state not in ("idle", "planned")):
            return False
        if self.cpus > node.cpus_free:
            return False
        if self.gives_memory:
            wanted = node.memory_mb if self.whole_memory else self.memory_mb or 0
            if wanted > node.memory_mb - node.memory_used_mb:
                return False
        if not self.gpus:
            return True
        free = node.gpus_free(self.gpu_type or None)
        return None if free is None else self.gpus <= free


def demand_of(
    request: Request,
    partition: Partition,
    chosen: Choice,
    config: Mapping[str, str],
    known: Mapping[str, Node] | None,
) -> Demand:
    """Return what a job needs there."""
    selects = selects_of(partition, config)
    gives_memory = "MEMORY" in selects
    whole = chosen.is_exclusive or partition.gives_whole_nodes
    whole = whole or "linear" in config.get("SelectType", "")
    cpus = request.cpus_per_node
    own, unknown = nodes_of(partition, chosen, known)
    if own:
        threads = max(node.threads_per_core for node in own)
        if "CR_CPU" not in selects:
            # Whole cores are allocated, with all their threads.
            cpus = math.ceil(cpus / threads) * threads
        if whole:
            cpus = max(cpus, min(node.cpus for node in own))
    of_a_gpu = _memory_per_gpu(request, partition, config)
    memory = request.memory_per_node_mb or _default_memory(partition, config, cpus)
    if of_a_gpu is not None:
        memory = of_a_gpu * request.gpus_per_node
    most = partition.max_memory_per_cpu_mb or notation.number(config, "MaxMemPerCPU")
    if gives_memory and most and request.memory_per_node_mb:
        cpus = max(cpus, math.ceil(request.memory_per_node_mb / most))
    minutes = _minutes(request)
    kind = chosen.gpu_type if request.gpus_per_node else ""
    demand = Demand(
        num_nodes=request.num_nodes,
        cpus=cpus,
        gpus=request.gpus_per_node,
        gpu_type=kind,
        memory_mb=memory,
        whole_nodes=whole,
        whole_memory=gives_memory
        and (memory is None or (whole and not request.memory_per_node_mb)),
        gives_memory=gives_memory,
        minutes=minutes,
        fitting=None,
        memory_per_gpu_mb=None if chosen.has_memory else of_a_gpu,
    )
    if own is None:
        return replace(demand, unknown=unknown)
    fitting = [
        node
        for node in own
        if demand.cpus <= node.cpus
        and (not gives_memory or demand.whole_memory or (memory or 0) <= node.memory_mb)
        and demand.gpus <= (node.gpus.get(kind, 0) if kind else sum(node.gpus.values()))
    ]
    return replace(
        demand,
        fitting=fitting,
        most_cpus=max((node.cpus for node in own), default=None),
        most_gpus=max(
            (node.gpus.get(kind, 0) if kind else sum(node.gpus.values()) for node in own),
            default=None,
        ),
        most_memory_mb=max((node.memory_mb for node in own), default=None),
    )


def _minutes(request: Request) -> int | None:
    """Return the time limit in minutes, as Slurm rounds it; None: unlimited."""
    seconds = notation.seconds(request.time)
    return None if seconds is None else math.ceil(seconds / 60)


def selects_of(partition: Partition, config: Mapping[str, str]) -> str:
    """Return what is allocated there, in Slurm's words: CR_CORE_MEMORY."""
    return partition.selects or config.get("SelectTypeParameters", "").upper()


def nodes_of(
    partition: Partition, chosen: Choice, known: Mapping[str, Node] | None
) -> tuple[list[Node] | None, list[str]]:
    """Return the nodes of the partition that the site's flags allow; if unknown, None and why."""
    if known is None:
        return None, []
    shown = sum(partition.name in node.partitions for node in known.values())
    if shown < partition.total_nodes:
        # Cloud nodes that are not started yet, for instance.
        hidden = f"{partition.total_nodes - shown} of {partition.total_nodes} nodes"
        return None, [f"unknown: {hidden} of partition {partition.name}, which are not shown"]
    needed = features(chosen.constraint)
    if needed is None:
        return None, [f"unknown: which nodes --constraint={chosen.constraint} matches"]
    only = set(hosts.expand(chosen.nodelist)) if chosen.nodelist else None
    without = set(hosts.expand(chosen.exclude))
    return [
        node
        for node in known.values()
        if partition.name in node.partitions
        and node.state != "future"
        and set(needed) <= set(node.features)
        and node.name not in without
        # A list of several nodes names those that must be included.
        and (only is None or node.name in only or len(only) > 1)
    ], []


def _memory_per_gpu(
    request: Request, partition: Partition, config: Mapping[str, str]
) -> int | None:
    """Return the memory per GPU of a job that asks for none; None: there is no such default.

    If set, it overrides all other defaults, and even the cluster's overrides the partition's.
    """
    if request.memory_per_node_mb or not request.gpus_per_node:
        return None
    own = partition.memory_per_gpu_mb
    return memory_per_gpu(config) if own is None else own


def _default_memory(partition: Partition, config: Mapping[str, str], cpus: int) -> int | None:
    """Return the memory per node of a job that asks for none; None: all, or unknown."""
    if partition.memory_per_cpu_mb is not None:
        return partition.memory_per_cpu_mb * cpus
    if partition.memory_per_node_mb is not None:
        return partition.memory_per_node_mb
    if (each := notation.number(config, "DefMemPerCPU")) is not None:
        return each * cpus
    return notation.number(config, "DefMemPerNode")
