"""Whether there is room for a job now: nodes in service, free, and not promised to others."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from cluster.check.choice import Choice
from cluster.check.demand import Demand
from cluster.check.finding import Finding, Verdict
from cluster.slurm import hosts
from cluster.slurm.call import Slurm
from cluster.slurm.nodes import Node
from cluster.slurm.reasons import clock, duration
from cluster.slurm.reservations import Reservation, epoch
from runfolder.errors import printable

# The margin that Slurm keeps for a job to start.
START_S = 30
# The shortest job that is worth queueing.
SHORTEST_S = 300


@dataclass(frozen=True, kw_only=True)
class Promise:
    """Nodes that belong to somebody else from some time on."""

    who: str
    start: float
    end: float | None
    nodes: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A job of any user that waits in the partition."""

    job_id: str
    reason: str
    start: str
    nodes: tuple[str, ...]


def waiting(queue: Slurm, partition: str) -> list[Waiting]:
    """Ask Slurm which jobs wait in a partition.

    Raises:
        SlurmError: it does not show them.
    """
    layout = "JobID:|,StartTime:|,SchedNodes:|,Reason:|"
    words = ["--noheader", "--states=PENDING", f"--partition={partition}", f"--Format={layout}"]
    shown = queue.call("squeue", *words)
    found = []
    for line in shown.splitlines():
        cells = line.split("|")
        if len(cells) >= 4 and re.match(r"\d", cells[0]):
            nodes = () if cells[2] in ("(null)", "N/A") else tuple(hosts.expand(cells[2]))
            found.append(Waiting(job_id=cells[0], start=cells[1], nodes=nodes, reason=cells[3]))
    return found


def promises(reservations: Iterable[Reservation], queue: Iterable[Waiting]) -> list[Promise]:
    """Return what is promised to others, by reservations and by the scheduler's plans."""
    found = []
    for kept in reservations:
        start = epoch(kept.start)
        if start is not None and kept.nodes:
            found.append(
                Promise(
                    who=f"reservation {printable(kept.name)}",
                    start=start,
                    end=epoch(kept.end),
                    nodes=frozenset(kept.nodes),
                )
            )
    for job in queue:
        start = epoch(job.start)
        if start is not None and job.nodes:
            found.append(
                Promise(who=f"job {job.job_id}", start=start, end=None, nodes=frozenset(job.nodes))
            )
    return found


def look(
    demand: Demand,
    known: Mapping[str, Node],
    chosen: Choice,
    reservations: Mapping[str, Reservation],
    queue: Iterable[Waiting],
    user: str,
    account: str,
    *,
    now: float | None = None,
) -> Iterator[Finding]:
    """Find why there is no room for a job at this moment (or `now`); nothing if there is."""
    now = time.time() if now is None else now
    fitting = list(demand.fitting or [])
    if chosen.reservation:
        mine = [reservations.get(name) for name in chosen.reservation.split(",")]
        for name, kept in zip(chosen.reservation.split(","), mine, strict=True):
            problem = _of_reservation(name, kept, user, account, now)
            if problem:
                yield problem
        inside = {name for kept in mine if kept for name in kept.nodes}
        fitting = [_opened(node) for node in fitting if node.name in inside]
        others = [kept for kept in reservations.values() if kept not in mine]
        if not inside:
            return
    else:
        others = list(reservations.values())
    ahead = list(queue)
    promised = promises((kept for kept in others if _is_whole(kept, known)), ahead)
    free = [node for node in fitting if demand.fits_free(node)]
    until = {node.name: _first_promise(node.name, promised, now) for node in free}
    # A job must end before the nodes belong to somebody else.
    lasts = None if demand.minutes is None else demand.minutes * 60
    usable = [node for node in free if _is_long_enough(until[node.name], lasts, now)]
    if len(usable) < demand.num_nodes:
        whose = f"partition {chosen.partition}"
        if len(free) < demand.num_nodes:
            yield _no_room(demand, fitting, len(free), whose)
        else:
            yield _promised(demand, [until[node.name] for node in free], whose, now)
        return
    first = next((job for job in ahead if job.reason == "Resources" and not job.nodes), None)
    if first is not None:
        yield Finding(
            verdict=Verdict.WAITS,
            limit="Priority",
            whose=f"partition {chosen.partition}",
            message=(
                f"job {first.job_id} is ahead of it in the queue, and Slurm has not planned its "
                "start yet"
            ),
        )


def _of_reservation(
    name: str, kept: Reservation | None, user: str, account: str, now: float
) -> Finding | None:
    whose = f"reservation {printable(name)}"
    if kept is None:
        message = f"{whose}: does not exist, or is hidden from you"
        return Finding(verdict=Verdict.NEVER, limit="Reservation", whose=whose, message=message)
    if not kept.admits(user, account) and not kept.groups:
        message = f"{whose}: is not open to user {user} with account {account}"
        return Finding(verdict=Verdict.NEVER, limit="Reservation", whose=whose, message=message)
    start = epoch(kept.start)
    if start is not None and start > now:
        message = f"{whose}: begins at {clock(kept.start)}"
        return Finding(verdict=Verdict.WAITS, limit="Reservation", whose=whose, message=message)
    return None


def _opened(node: Node) -> Node:
    """Return a node as the users of its reservation see it."""
    if node.state not in ("reserved", "maintenance"):
        return node
    used = node.cpus_used
    state = "idle" if not used else "mixed" if used < node.cpus else "allocated"
    return replace(node, state=state)


def _is_whole(kept: Reservation, known: Mapping[str, Node]) -> bool:
    """Return whether whole nodes are reserved; if only some cores are, the rest is free."""
    cpus = sum(known[name].cpus for name in kept.nodes if name in known)
    return not kept.cpus or kept.cpus * _most_threads(kept, known) >= cpus


def _most_threads(kept: Reservation, known: Mapping[str, Node]) -> int:
    return max((known[n].threads_per_core for n in kept.nodes if n in known), default=1)


def _first_promise(name: str, promised: list[Promise], now: float) -> Promise | None:
    ours = [one for one in promised if name in one.nodes and (one.end is None or one.end > now)]
    return min(ours, key=lambda one: one.start, default=None)


def _is_long_enough(promise: Promise | None, lasts: int | None, now: float) -> bool:
    if promise is None:
        return True
    return lasts is not None and now + lasts + START_S <= promise.start


def _no_room(demand: Demand, fitting: list[Node], free: int, whose: str) -> Finding:
    in_service = [node for node in fitting if node.is_in_service]
    states: dict[str, list[str]] = {}
    for node in fitting:
        if not demand.fits_free(node):
            word = node.state
            if node.state in ("idle", "mixed", "planned"):
                word = "not enough is free"
            states.setdefault(word, []).append(node.name)
    listed = "; ".join(f"{word}: {hosts.compact(names)}" for word, names in states.items())
    nodes = "1 node" if demand.num_nodes == 1 else f"{demand.num_nodes} nodes"
    each = "" if demand.num_nodes == 1 else " each"
    message = f"{nodes} with {demand}{each} needed, {free} free now"
    if len(in_service) < demand.num_nodes:
        message += ", and too few in service"
    kept = [node for node in fitting if node.state in ("reserved", "maintenance")]
    limit = "Resources"
    if len(in_service) < demand.num_nodes:
        limit = "Reservation" if len(in_service) + len(kept) >= demand.num_nodes else "Nodes"
    return Finding(
        verdict=Verdict.WAITS,
        limit=limit,
        whose=whose,
        message=f"{message} ({listed})" if listed else message,
        fits_with=f"NODES={free}" if free else "",
    )


def _promised(demand: Demand, until: list[Promise | None], whose: str, now: float) -> Finding:
    # The nodes that are free the longest count.
    begins = sorted((one.start if one else float("inf") for one in until), reverse=True)
    left = begins[demand.num_nodes - 1] - now - START_S
    hindering = min((one for one in until if one), key=lambda one: one.start)
    when = clock(time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(hindering.start)))
    begun = hindering.start <= now
    fits = left >= SHORTEST_S
    message = f"nodes that are free now {'belong' if begun else 'will belong'} to {hindering.who}"
    message += "" if begun else f" from {when or 'later'} on"
    if fits:
        message += "; a job that ends before then starts now"
    return Finding(
        verdict=Verdict.WAITS,
        limit="Reservation" if hindering.who.startswith("reservation") else "Priority",
        whose=hindering.who,
        message=message,
        fits_with=f"TIME={duration(left // 60 * 60)}" if fits else "",
    )
