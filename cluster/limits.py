"""What a site's Slurm would never run, found before it is asked to."""

from __future__ import annotations

import getpass
import re

from cluster import slurm
from cluster.errors import UserError, did_you_mean
from cluster.request import Request
from cluster.site import Site


def check(queue: slurm.Slurm, site: Site, request: Request) -> list[str]:
    """Return remarks on a job that can run some day; of those that never can, say why.

    Slurm's own `--test-only` lets limits pass that then hold the job for ever.

    Raises:
        UserError: it can never run; with the limit, and where it is.
    """
    config = queue.config()
    _check_partition(queue, site, request)
    if not config.get("AccountingStorageType", "").endswith("slurmdbd"):
        return ["this Slurm keeps no accounts: no limits of yours to check"]
    try:
        _check_account(queue, site, request, config.get("ClusterName", ""))
    except slurm.ControllerUnreachable:
        raise
    except slurm.SlurmError as error:
        return [f"accounts and their limits are unknown: sacctmgr says: {error}"]
    return []


def _check_partition(queue: slurm.Slurm, site: Site, request: Request) -> None:
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


def _check_account(queue: slurm.Slurm, site: Site, request: Request, cluster: str) -> None:
    user = getpass.getuser()
    listed = queue.call(
        *("sacctmgr", "--noheader", "--parsable2", "show", "associations"),
        *(f"user={user}", f"cluster={cluster}", "format=account,partition,qos,maxwall"),
    )
    # Account, partition (all where it is empty), QOS, limit.
    lines = [line.split("|") for line in listed.splitlines()]
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
    mine = [line for line in associations if site.slurm.account in ("", line[0])]
    known = sorted({qos for line in mine for qos in line[2].split(",") if qos})
    if site.slurm.qos and site.slurm.qos not in known:
        raise UserError(
            f"{source}: slurm.qos '{site.slurm.qos}' is not one of yours: {', '.join(known)}"
        )
    if len(mine) == 1:
        _check_time(request, mine[0][3], f"account {mine[0][0]}")
    if site.slurm.qos:
        shown = queue.call(
            *("sacctmgr", "--noheader", "--parsable2", "show", "qos"),
            *(f"name={site.slurm.qos}", "format=maxwall"),
        )
        _check_time(request, shown.strip(), f"QOS {site.slurm.qos}")


def _check_time(request: Request, limit: str, whose: str) -> None:
    most = slurm.seconds(limit) if re.match(r"\d", limit) else None
    asked = slurm.seconds(request.time)
    if most is not None and (asked is None or asked > most):
        raise UserError(
            f"TIME={request.time}: {whose} allows at most {limit}; ask for less: a run saves at "
            "its limit and goes on in the next job by itself"
        )
