"""What a cluster has, what of it is free, what I may use, and why my jobs wait.

Each thing is asked for once. What Slurm or the site does not show is listed as unknown.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cluster.check import limits, login_node
from cluster.check.limits import Rules
from cluster.slurm import hosts, nodes, reservations
from cluster.slurm.associations import Accounting, Bound, Holder
from cluster.slurm.call import Slurm
from cluster.slurm.nodes import Node
from cluster.slurm.partitions import Partition
from cluster.slurm.reasons import WAITING, waits
from cluster.slurm.refusals import ControllerUnreachable, SlurmError
from cluster.slurm.reservations import Reservation, epoch
from runfolder.errors import printable

VERSION = 1
Answer = TypeVar("Answer")


def facts(queue: Slurm) -> dict[str, Any]:
    """Return all of it, for programs and for the table (docs/check.md has the schema).

    Raises:
        SlurmError: Slurm does not answer at all.
    """
    unknown: dict[str, str] = {}
    # The commands on this machine run in parallel with Slurm's.
    with ThreadPoolExecutor(1) as pool:
        here = pool.submit(login_node.facts, unknown)
        return _facts(queue, unknown) | {"login_node": here.result(), "unknown": unknown}


def _facts(queue: Slurm, unknown: dict[str, str]) -> dict[str, Any]:
    rules = limits.read(queue)
    for words in (*rules.unknown, *rules.accounting.unknown):
        what, _, why = words.partition(": ")
        unknown[what] = printable(why)
    for partition in rules.partitions.values():
        for key in partition.unknown:
            unknown[f"{key} of partition {printable(partition.name)}"] = "scontrol does not show it"
    if not rules.partitions:
        unknown["partitions"] = "scontrol shows none"
    kept = _or_unknown("reservations", lambda: reservations.read(queue), unknown)
    jobs = _or_unknown("jobs", lambda: _jobs(queue), unknown)
    return {
        "version": VERSION,
        "kind": "overview",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cluster": printable(rules.config.get("ClusterName", "")) or None,
        "slurm_version": printable(rules.config.get("SLURM_VERSION", "")) or None,
        "user": rules.user,
        "partitions": [
            _partition(partition, rules.nodes) for partition in rules.partitions.values()
        ],
        "nodes": None if rules.nodes is None else [_node(n) for n in rules.nodes.values()],
        "reservations": None if kept is None else [_reservation(one) for one in kept.values()],
        **_accounts(rules, unknown),
        "fair_share": _fair_share(queue, rules, unknown),
        "jobs": jobs,
    }


def _or_unknown(what: str, ask: Callable[[], Answer], unknown: dict[str, str]) -> Answer | None:
    try:
        return ask()
    except ControllerUnreachable:
        raise
    except SlurmError as error:
        unknown[what] = printable(str(error))
        return None


def _partition(partition: Partition, known: Mapping[str, Node] | None) -> dict[str, Any]:
    own = [n for n in (known or {}).values() if partition.name in n.partitions]
    states: dict[str, int] = {}
    for node in own:
        states[node.state] = states.get(node.state, 0) + 1
    gpus = [
        {"type": printable(kind) or None, "free": free, "total": total}
        for kind, (free, total) in sorted(nodes.free_gpus(own).items())
    ]
    return {
        "name": printable(partition.name),
        "state": printable(partition.state),
        "is_default": partition.is_default,
        "total_nodes": partition.total_nodes,
        "min_nodes": partition.min_nodes,
        "max_nodes": None if "MaxNodes" in partition.unknown else _most(partition),
        "max_time": printable(partition.max_time),
        "allowed_accounts": _names(partition.allowed_accounts),
        "denied_accounts": _names(partition.denied_accounts),
        "allowed_qos": _names(partition.allowed_qos),
        "denied_qos": _names(partition.denied_qos),
        "allowed_groups": _names(partition.allowed_groups),
        "qos": printable(partition.qos) or None,
        "nodes_by_state": None if known is None else states,
        "whole_free_nodes": None if known is None else sum(n.is_whole_free for n in own),
        "free_cpus": None if known is None else sum(n.cpus_free for n in own),
        "total_cpus": None if known is None else sum(n.cpus for n in own),
        "gpus": None if known is None else gpus,
    }


def _most(partition: Partition) -> int:
    most = partition.max_nodes
    return partition.total_nodes if most is None else min(most, partition.total_nodes)


def _names(names: list[str] | None) -> list[str] | None:
    return None if names is None else [printable(name) for name in names]


def _node(node: Node) -> dict[str, Any]:
    return {
        "name": printable(node.name),
        "state": node.state,
        "slurm_state": printable(node.slurm_state),
        "partitions": [printable(name) for name in node.partitions],
        "cpus": node.cpus,
        "free_cpus": node.cpus_free,
        "memory_mb": node.memory_mb,
        "free_memory_mb": max(0, node.memory_mb - node.memory_used_mb) if node.is_in_service else 0,
        "gpus": [
            {"type": printable(kind) or None, "free": node.gpus_free(kind), "total": count}
            for kind, count in sorted(node.gpus.items())
        ],
        "features": [printable(name) for name in node.features],
        "is_whole_free": node.is_whole_free,
        "reason": printable(node.reason) or None,
    }


def _reservation(kept: Reservation) -> dict[str, Any]:
    start, end = epoch(kept.start), epoch(kept.end)
    known = start is not None and end is not None
    return {
        "name": printable(kept.name),
        "start": printable(kept.start) or None,
        "end": printable(kept.end) or None,
        "is_active": start <= time.time() < end if start and end and known else None,
        "nodes": printable(hosts.compact(kept.nodes)),
        "cpus": kept.cpus or None,
        "partition": printable(kept.partition) or None,
        "users": [printable(name) for name in kept.users],
        "accounts": [printable(name) for name in kept.accounts],
        "groups": [printable(name) for name in kept.groups],
        "flags": [printable(flag) for flag in kept.flags],
    }


def _accounts(rules: Rules, unknown: dict[str, str]) -> dict[str, Any]:
    kept = rules.accounting
    if not kept.binds:
        unknown["accounts"] = "this Slurm does not enforce accounts, so no account limits apply"
    elif not kept.limits_bind:
        unknown["limits"] = "this Slurm enforces accounts, but not their limits"
    for words in _unseen(kept):
        unknown[words] = "the site does not show them"
    mine = {name for one in kept.associations for name in one.qos or ()}
    mine |= {partition.qos for partition in rules.partitions.values()}
    hidden = not kept.binds or kept.is_hidden
    return {
        "enforced": sorted(word for word in kept.enforced if word not in ("", "none")),
        "default_account": printable(kept.default_account) or None,
        "associations": None
        if hidden
        else [
            {
                "account": printable(one.account),
                "partition": printable(one.partition) or None,
                "qos": None if one.qos is None else _names(list(one.qos)),
                "default_qos": printable(one.default_qos) or None,
                "limits": _limits(one.holder),
                "limits_above": None
                if one.above is None
                else [limit for holder in one.above for limit in _limits(holder)],
            }
            for one in kept.associations
        ],
        "qos": None
        if not kept.binds or not kept.qos
        else [
            {
                "name": printable(qos.name),
                "is_mine": qos.name in mine if kept.associations else None,
                "priority": qos.priority,
                "flags": _names(list(qos.flags)),
                "preempts": _names(list(qos.preempts)),
                "limits": _limits(qos.holder),
            }
            for qos in kept.qos.values()
        ],
    }


def _unseen(kept: Accounting) -> list[str]:
    return [
        f"limits of the accounts above {printable(one.account)}"
        for one in kept.associations
        if one.above is None
    ]


def _limits(holder: Holder) -> list[dict[str, Any]]:
    return [_limit(bound) for _, bound in sorted(holder.bounds.items())]


def _limit(bound: Bound) -> dict[str, Any]:
    return {
        "whose": printable(bound.whose),
        "name": bound.name,
        "of": printable(bound.tres) or None,
        "limit": bound.limit,
        "text": printable(bound.text),
        "used": bound.used,
    }


def _fair_share(queue: Slurm, rules: Rules, unknown: dict[str, str]) -> list[dict[str, Any]] | None:
    if not rules.config.get("PriorityType", "").endswith("multifactor"):
        unknown["fair_share"] = "this Slurm has none (no priority/multifactor)"
        return None
    layout = "Account,User,RawShares,NormShares,RawUsage,EffectvUsage,FairShare"
    words = ("sshare", "--noheader", "--parsable2", "--Users", rules.user, f"--format={layout}")
    said = _or_unknown("fair_share", lambda: queue.call(*words), unknown)
    rows = fair_share(said or "", rules.user)
    if said is not None and not rows:
        unknown["fair_share"] = "sshare shows none for you"
    weight = rules.config.get("PriorityWeightFairShare", "")
    for row in rows:
        row["weight"] = int(weight) if weight.isdecimal() else None
    return rows or None


def fair_share(said: str, user: str) -> list[dict[str, Any]]:
    """Return my rows of sshare's output."""
    found = []
    for line in said.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) >= 7 and cells[1] == user:
            found.append(
                {
                    "account": printable(cells[0]),
                    "shares": _float(cells[3]),
                    "usage": _float(cells[5]),
                    "fair_share": _float(cells[6]),
                }
            )
    return found


def _float(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,30}(\.\d{1,30})?", text) else None


def _jobs(queue: Slurm) -> list[dict[str, Any]]:
    # The name may contain a bar, so it comes last.
    layout = "%i|%T|%P|%q|%D|%S|%L|%r|%j"
    return my_jobs(queue.call("squeue", "--noheader", "--me", "--format", layout), queue.cluster)


def my_jobs(said: str, cluster: str = "") -> list[dict[str, Any]]:
    """Return my jobs in squeue's output for that cluster; empty: the local one."""
    found = []
    for line in said.splitlines():
        cells = line.split("|", 8)
        if len(cells) < 9 or not re.match(r"\d", cells[0]):
            # The rest of a name that contains a line break.
            continue
        job_id, state, partition, qos, count, start, left, reason, name = map(printable, cells)
        number = int(re.match(r"\d{1,12}", job_id)[0])  # type: ignore[index]
        waiting = state in WAITING
        found.append(
            {
                "id": job_id,
                "name": name,
                "state": state,
                "partition": partition,
                "qos": qos,
                "num_nodes": int(count) if count.isdecimal() and len(count) < 12 else None,
                "start": start if epoch(start) is not None else None,
                "time_left": None if waiting else left,
                "reason": reason if waiting else None,
                "why": waits(reason, start, number, cluster) if waiting else None,
            }
        )
    return found
