"""What a site's Slurm would never run, found before it is asked to."""

from __future__ import annotations

import getpass
import os
import re
from dataclasses import dataclass

from cluster import slurm
from cluster.errors import UserError, did_you_mean
from cluster.request import Request
from cluster.site import Site

# Options of sbatch that say whose limits hold.
CHOOSES = ("--account", "-A", "--qos", "-q", "--partition", "-p")


def check(queue: slurm.Slurm, site: Site, request: Request) -> list[str]:
    """Return remarks on a job that can run some day; of those that never can, say why.

    Slurm's own `--test-only` lets limits pass that then hold the job for ever.

    Raises:
        UserError: it can never run; with the limit, and where it is.
    """
    config = queue.config()
    partition = _check_partition(queue, site, request)
    # Where accounts are kept for the record alone, nobody needs one, and their limits do not bind.
    enforced = set(config.get("AccountingStorageEnforce", "").lower().split(","))
    if not enforced & {"associations", "limits", "qos", "safe", "all"}:
        return ["this Slurm enforces no accounts: no limits of yours to check"]
    if any(flag.startswith(CHOOSES) for flag in site.slurm.sbatch_flags):
        return ["account and limits are not checked, because slurm.sbatch_flags chooses them"]
    try:
        limits = _check_account(queue, site, config.get("ClusterName", ""), partition, enforced)
        if enforced & {"limits", "safe", "all"}:
            _check_limits(request, limits)
    except slurm.ControllerUnreachable:
        raise
    except slurm.SlurmError as error:
        return [f"accounts and their limits are unknown: sacctmgr says: {error}"]
    return []


@dataclass(frozen=True)
class Limit:
    """What one job may have, by somebody's rule; empty where there is none."""

    whose: str
    wall: str
    """[days-]hours:minutes:seconds."""
    resources: str
    """Of all its nodes together: cpu=64,gres/gpu=8,mem=500G,node=4."""


def _check_partition(queue: slurm.Slurm, site: Site, request: Request) -> slurm.Partition:
    name = site.slurm.partition
    where = f"{site.source or 'the private cluster'}: slurm.partition '{name}'"
    partition = queue.partition(name)
    if partition is None:
        raise UserError(
            f"{where}: there is no such partition{did_you_mean(name, queue.partitions())}"
        )
    if partition.state != "UP":
        raise UserError(f"{where}: is {partition.state}; choose another, or ask the site")
    most = min(partition.total_nodes, partition.max_nodes or partition.total_nodes)
    if request.num_nodes > most:
        limit = "has" if most == partition.total_nodes else "gives a job at most"
        raise UserError(
            f"NODES={request.num_nodes}: partition {name} {limit} {most}; ask for fewer, or "
            "another partition"
        )
    _check_time(request, partition.max_time, f"partition {name}")
    for kind, chosen, allowed in (
        ("account", site.slurm.account, partition.allowed_accounts),
        ("QOS", site.slurm.qos, partition.allowed_qos),
    ):
        if chosen and allowed is not None and chosen not in allowed:
            raise UserError(f"{where}: is closed to {kind} {chosen}; open to {', '.join(allowed)}")
    return partition


def _check_account(
    queue: slurm.Slurm, site: Site, cluster: str, partition: slurm.Partition, enforced: set[str]
) -> list[Limit]:
    """Check that account and QOS may be used; return the limits that come, the strongest first.

    Raises:
        UserError: one may not.
    """
    user = getpass.getuser()
    layout = "account,partition,qos,defaultqos,maxwall,maxtresperjob"
    lines = _accounting(
        queue, "associations", f"user={user}", f"cluster={cluster}", f"format={layout}"
    )
    # In all partitions where none is named.
    associations = [line for line in lines if line[1] in ("", site.slurm.partition)]
    accounts = sorted({line[0] for line in associations})
    source = site.source or "the private cluster"
    if not accounts:
        raise UserError(f"user {user} has no account on this cluster; ask the site for one")
    if site.slurm.account and site.slurm.account not in accounts:
        raise UserError(
            f"{source}: slurm.account '{site.slurm.account}' is not one of yours: "
            f"{', '.join(accounts)}"
        )
    account = site.slurm.account or os.environ.get("SBATCH_ACCOUNT", "")
    if not account and len(accounts) > 1:
        # What sbatch takes of several.
        ((account,),) = _accounting(queue, "user", f"name={user}", "format=defaultaccount")
    mine = [line for line in associations if account in ("", line[0])] or associations
    known = sorted({qos for line in mine for qos in line[2].split(",") if qos})
    if enforced & {"qos", "all"} and site.slurm.qos and site.slurm.qos not in known:
        raise UserError(
            f"{source}: slurm.qos '{site.slurm.qos}' is not one of yours: {', '.join(known)}"
        )
    # The association of this very partition before that of all.
    name, _, _, default, wall, resources = max(mine, key=lambda line: line[1])
    qos = site.slurm.qos or default or (known[0] if len(known) == 1 else "")
    names = sorted({qos, partition.qos} - {""})
    layout = "format=name,flags,maxwall,maxtresperjob"
    shown = _accounting(queue, "qos", f"name={','.join(names)}", layout) if names else []
    by_name = {row[0]: (row[1], Limit(f"QOS {row[0]}", *row[2:])) for row in shown}
    _, of_partition = by_name.get(partition.qos, ("", None))
    flags, of_job = by_name.get(qos, ("", None))
    order = [of_job, of_partition] if "OverPartQOS" in flags else [of_partition, of_job]
    return [limit for limit in order if limit] + [Limit(f"account {name}", wall, resources)]


def _accounting(queue: slurm.Slurm, *words: str) -> list[list[str]]:
    shown = queue.call("sacctmgr", "--noheader", "--parsable2", "show", *words)
    return [line.split("|") for line in shown.splitlines()]


def _check_limits(request: Request, limits: list[Limit]) -> None:
    """Check against the limits of QOS and account: of each kind the first that is set holds.

    That is Slurm's order: https://slurm.schedmd.com/resource_limits.html (Hierarchy).
    """
    for limit in limits:
        if limit.wall:
            _check_time(request, limit.wall, limit.whose)
            break
    for kind, what, variable, given, each in (
        ("node", "nodes", "NODES", request.num_nodes, 1),
        ("gres/gpu", "GPUs", "GPUS", request.gpus_per_node, request.gpus_per_node),
        ("cpu", "CPUs", "NODES", request.num_nodes, request.cpus_per_node),
    ):
        asked = request.num_nodes * each
        for limit in limits:
            words = dict(word.partition("=")[::2] for word in limit.resources.split(","))
            most = words.get(kind, "")
            if most.isdecimal() and asked > int(most):
                raise UserError(
                    f"{variable}={given}: {limit.whose} allows a job at most {most} {what}, and "
                    f"this one asks for {asked}; ask for fewer"
                )
            if most:
                break


def _check_time(request: Request, limit: str, whose: str) -> None:
    most = slurm.seconds(limit) if re.match(r"\d", limit) else None
    asked = slurm.seconds(request.time)
    if most is not None and (asked is None or asked > most):
        raise UserError(
            f"TIME={request.time}: {whose} allows at most {limit}; ask for less: a run saves at "
            "its limit and goes on in the next job by itself"
        )
