"""What a job asks Slurm for: sizes resolved from the job, the site and the command line."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.site.settings import Site
from cluster.slurm import notation
from cluster.slurm.reasons import duration
from runfolder.errors import UserError

# How much earlier than requested Slurm may send the signal: man sbatch, --signal.
SIGNAL_EARLY_S = 60


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the command line says: NODES, GPUS, NPROC and TIME; empty if it says nothing."""

    nodes: str = ""
    gpus: str = ""
    nproc: str = ""
    time: str = ""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The sizes of a job."""

    num_nodes: int
    gpus_per_node: int
    processes_per_node: int
    time: str
    """The limit, in Slurm's notation."""
    cpus_per_node: int
    memory_per_node_mb: int
    """0: Slurm's own default."""
    device: str
    """cuda or cpu."""

    @property
    def world_size(self) -> int:
        """The processes on all nodes."""
        return self.num_nodes * self.processes_per_node

    @classmethod
    def of_this_machine(cls, num_processes: int, *, num_gpus: int) -> Request:
        """Return the sizes of a run that has this machine to itself."""
        return cls(
            num_nodes=1,
            gpus_per_node=num_gpus,
            processes_per_node=num_processes,
            time="",
            cpus_per_node=len(os.sched_getaffinity(0)),
            memory_per_node_mb=0,
            device="cuda" if num_gpus else "cpu",
        )

    def __str__(self) -> str:
        """For messages: 2 nodes x 4 GPUs, 4:00:00."""
        gpus = f"{self.gpus_per_node} GPU{'s' if self.gpus_per_node != 1 else ''}"
        each = f"{gpus}, " if self.gpus_per_node else ""
        many = "es" if self.processes_per_node != 1 else ""
        each += f"{self.processes_per_node} process{many}"
        nodes = f"{self.num_nodes} node{'s' if self.num_nodes != 1 else ''}"
        cpus = f"{self.cpus_per_node} CPU{'s' if self.cpus_per_node != 1 else ''} each"
        return f"{nodes} x ({each}), {cpus}, at most {self.time} ({in_words(self.time)})"


def in_words(time: str) -> str:
    """Return a time limit in words: not everybody reads 24:00 as 24 minutes."""
    seconds = notation.seconds(time)
    if seconds is None:
        return "without limit"
    parts = []
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count, seconds = divmod(seconds, length)
        if count:
            parts.append(f"{count} {unit}{'s' if count != 1 else ''}")
    return " ".join(parts) or "no time"


def resolve_request(
    site: Site, sizes: Sizes, *, asked: dict[str, Any], origin: str, on_cpu: bool
) -> Request:
    """Return the sizes of a job, of which `asked` are its own.

    `asked` has the keys num_nodes, gpus_per_node, time and, for a run to continue,
    processes_per_node; `origin` says where they are set. `on_cpu`: a dry run.

    Raises:
        UserError: a node of the site's partition does not have what is asked for.
    """
    num_nodes = whole_number("NODES", sizes.nodes, 1) or asked["num_nodes"]
    gpus = whole_number("GPUS", sizes.gpus, 0)
    if gpus is None:
        gpus = 0 if on_cpu else asked["gpus_per_node"]
        if gpus > site.slurm.gpus_per_node:
            raise UserError(
                f"{origin}: asks for {gpus} GPUs per node, but a node has {_has_gpus(site)}; "
                "choose with GPUS=, or train on CPUs with GPUS=0"
            )
    elif gpus > site.slurm.gpus_per_node:
        raise UserError(f"GPUS={gpus}: a node has {_has_gpus(site)}")
    given = whole_number("NPROC", sizes.nproc, 1)
    before = asked.get("processes_per_node") if gpus == asked["gpus_per_node"] else None
    # With GPUs there is one process per GPU, whatever it was before.
    processes = given or gpus or before or 1
    if gpus and processes != gpus:
        raise UserError(
            f"NPROC={processes}: each process uses one GPU, and the job asks for {gpus} per node; "
            f"set GPUS={processes}, or leave NPROC out"
        )
    cpus = _share(site.slurm.cpus_per_node, gpus, site.slurm.gpus_per_node)
    memory = _share(site.slurm.memory_per_node_mb, gpus, site.slurm.gpus_per_node)
    if on_cpu and not gpus:
        # Small, so that it fits beside others.
        cpus, memory = min(cpus, processes), 0
    if processes > cpus:
        raise UserError(
            f"NPROC={processes}: a job gets {cpus} CPUs per node here, and each process needs at "
            "least one"
        )
    return Request(
        num_nodes=num_nodes,
        gpus_per_node=gpus,
        processes_per_node=processes,
        time=_time(site, sizes.time or asked["time"]),
        cpus_per_node=cpus,
        memory_per_node_mb=memory,
        device="cuda" if gpus and not on_cpu and site.container.variant == "cuda" else "cpu",
    )


def is_dry_run(script_arguments: list[str]) -> bool:
    """Return whether it is a dry run, which asks for other sizes.

    Raises:
        UserError: --dry_run is written in a way that only the script would understand.
    """
    for word, value in itertools.pairwise([*script_arguments, ""]):
        if word.startswith("--dry_run=") or (word == "--dry_run" and value in ("true", "false")):
            raise UserError("ARGS: write --dry_run without a value, or leave it out")
    return "--dry_run" in script_arguments


def sbatch_command(site: Site, request: Request, *, name: str, folder: Path) -> list[str]:
    """Return the sbatch command that queues a run's folder."""
    command = ["sbatch", "--parsable", f"--job-name={name}"]
    command += [f"--partition={site.slurm.partition}"]
    if site.slurm.account:
        command.append(f"--account={site.slurm.account}")
    if site.slurm.qos:
        command.append(f"--qos={site.slurm.qos}")
    command += [f"--nodes={request.num_nodes}", "--ntasks-per-node=1"]
    command.append(f"--cpus-per-task={request.cpus_per_node}")
    if request.gpus_per_node:
        kind = f"{site.slurm.gpu_type}:" if site.slurm.gpu_type else ""
        command.append(f"--gpus-per-node={kind}{request.gpus_per_node}")
    if request.memory_per_node_mb:
        command.append(f"--mem={request.memory_per_node_mb}M")
    command += [f"--time={request.time}", f"--signal=B:USR1@{site.slurm.save_s}"]
    # --export=ALL: that is the few variables that cluster/commands/plan.py gives the command.
    command += ["--requeue", "--open-mode=append", "--export=ALL"]
    # Slurm would read a % in the name of a folder as the start of a pattern such as %j.
    pattern = str(folder).replace("%", "%%")
    command += [f"--chdir={folder}", f"--output={pattern}/slurm-%j.log"]
    return [*command, *site.slurm.sbatch_flags]


def _has_gpus(site: Site) -> str:
    where = f"{site.source}: slurm.gpus_per_node" if site.source else "the private cluster"
    return f"{site.slurm.gpus_per_node or 'none'} ({where})"


def _share(whole: int, gpus: int, of_gpus: int) -> int:
    if not whole:
        return 0
    return max(1, whole * gpus // of_gpus) if gpus else whole


def whole_number(variable: str, given: str, least: int) -> int | None:
    """Return the number that a variable of make has; None if it is empty.

    Raises:
        UserError: it is not a whole number, or less than `least`.
    """
    if not given:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", given) or int(given) < least:
        raise UserError(f"{variable}={given}: must be a whole number, at least {least}")
    return int(given)


def least_s(save_s: int) -> int:
    """Return the shortest time limit, in seconds, that leaves a job time to train."""
    return max(2 * save_s, save_s + SIGNAL_EARLY_S)


def _time(site: Site, time: str) -> str:
    try:
        limit = notation.seconds(time)
    except ValueError:
        raise UserError(
            f"TIME={time}: is not a time limit; write minutes, hours:minutes:seconds or "
            "days-hours:minutes:seconds"
        ) from None
    least = least_s(site.slurm.save_s)
    if limit is not None and limit < least:
        where = site.source or "the private cluster"
        raise UserError(
            f"TIME={time} ({in_words(time)}): leaves no time to train, because the job begins to "
            f"save {site.slurm.save_s} s before its end ({where}: slurm.save_s), and Slurm may "
            f"signal it up to {SIGNAL_EARLY_S} s early; give {duration(least)} or more"
        )
    return time
