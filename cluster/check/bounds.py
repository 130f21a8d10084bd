"""A job checked against the limits of QOS and account, in the order in which Slurm applies them.

Of each kind of limit the first one that is set applies: that of the partition's QOS, the job's QOS
(the other way round if the job's has the flag OverPartQOS), the association of user and account;
group limits of every parent account apply as well.
https://slurm.schedmd.com/resource_limits.html (Hierarchy), and src/slurmctld/acct_policy.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.check.demand import Demand
from cluster.check.finding import Finding, Verdict, never, over_time
from cluster.plan.request import Request
from cluster.slurm.associations import Association, Bound, Holder, Qos
from cluster.slurm.reasons import duration

WORDS = {"node": "nodes", "gres/gpu": "GPUs", "cpu": "CPUs", "mem": "MB of memory"}
SETTINGS = {"node": "NODES", "gres/gpu": "GPUS", "cpu": "NODES", "mem": "NODES"}
# In the order in which Slurm checks: all that a job may ever have, then what it must wait for. Each
# limit of a QOS is followed by the limit of an association that it overrides.
PER_JOB = (("MaxTRESPJ", "MaxTRESPJ"), ("MaxTRESPN", "MaxTRESPN"), ("MinTRESPJ", ""))
MINUTES_PER_JOB = (("MaxTRESMinsPJ", "MaxTRESMinsPJ"),)
AT_ONCE = (("MaxTRESPU", ""), ("MaxTRESPA", ""), ("GrpTRES", "GrpTRES"))
MINUTES = (("GrpTRESMins", "GrpTRESMins"), ("GrpTRESRunMins", "GrpTRESRunMins"))
JOBS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("MaxJobsPU", "MaxJobsPA"), "MaxJobs"),
    (("GrpJobs",), "GrpJobs"),
)
SUBMITTED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("MaxSubmitJobsPU", "MaxSubmitJobsPA"), "MaxSubmitJobs"),
    (("GrpSubmitJobs",), "GrpSubmitJobs"),
)
WHO = {"PU": "user", "PA": "account"}


@dataclass(frozen=True, kw_only=True)
class Holders:
    """What limits a job: the QOS in order of precedence, the association, the parent accounts."""

    qos: list[Holder]
    association: Holder | None
    above: tuple[Holder, ...]

    @classmethod
    def of(
        cls, association: Association | None, of_partition: Qos | None, of_job: Qos | None
    ) -> Holders:
        """Return them in order of precedence."""
        order = [of_partition, of_job]
        if of_job is not None and "OverPartQOS" in of_job.flags:
            order.reverse()
        distinct = list({qos.name: qos.holder for qos in order if qos is not None}.values())
        return cls(
            qos=distinct,
            association=association.holder if association else None,
            above=(association.above or ()) if association else (),
        )

    def bounds(self, name: str, in_association: str) -> Iterator[Bound]:
        """Return the limits of one name that apply: one per resource, or one per account."""
        seen: set[str] = set()
        for holder in self.qos:
            own = {key[1]: bound for key, bound in holder.bounds.items() if key[0] == name}
            yield from (bound for kind, bound in own.items() if kind not in seen)
            seen |= set(own)
        rest = [self.association] if self.association and in_association else []
        if name.startswith("Grp"):
            rest += self.above
        for other in rest:
            for key, bound in other.bounds.items():
                if key[0] == in_association and key[1] not in seen:
                    yield bound

    def unknown_use(self) -> Iterator[str]:
        """Return the limits whose current usage Slurm does not show."""
        for holder in [*self.qos, *filter(None, [self.association]), *self.above]:
            for bound in holder.bounds.values():
                if bound.used is None and not _is_per_job(bound):
                    yield f"current usage of {_name(bound)} of {bound.whose}"


def over_bounds(
    holders: Holders, request: Request, demand: Demand, *, safe: bool
) -> Iterator[Finding]:
    """Find the limits that a job would always exceed, and those that make it wait.

    `safe`: AccountingStorageEnforce includes it, so a job starts only if it can finish within its
    group's minutes; without it jobs start while any are left, and are killed when they run out.
    """
    for bound in holders.bounds("MaxWallPJ", "MaxWallPJ"):
        if over := over_time(request, bound.text, bound.whose, "MaxWall"):
            yield over
    for name, other in PER_JOB:
        for bound in holders.bounds(name, other):
            yield from _of_one_job(bound, request, demand)
    for name, other in MINUTES_PER_JOB:
        for bound in holders.bounds(name, other):
            yield from _of_time(bound, request, demand, used=0)
    for name, other in AT_ONCE:
        for bound in holders.bounds(name, other):
            yield from _at_once(bound, request, demand)
    for name, other in MINUTES:
        for bound in holders.bounds(name, other):
            if safe or name == "GrpTRESRunMins":
                yield from _of_time(bound, request, demand, used=bound.used)
            elif count := demand.of_all_nodes().get(bound.tres):
                yield from _until_used_up(bound, demand, count)
    for bound in holders.bounds("GrpWall", "GrpWall"):
        if safe:
            yield from _wall(bound, request, demand)
        else:
            yield from _until_used_up(bound, demand, 1)
    for kinds, verb in ((SUBMITTED, "queued"), (JOBS, "running")):
        for names, other in kinds:
            for bound in _first(holders, names, other):
                yield from _jobs(bound, verb)


def _first(holders: Holders, names: tuple[str, ...], other: str) -> Iterator[Bound]:
    """Return a QOS's limits per user and per account or, if it has neither, an association's."""
    of_qos = [bound for name in names for bound in holders.bounds(name, "")]
    yield from of_qos
    if not of_qos:
        yield from holders.bounds(other, other)


def _of_one_job(bound: Bound, request: Request, demand: Demand) -> Iterator[Finding]:
    per_node = bound.name == "MaxTRESPN"
    asked = (demand.of_a_node() if per_node else demand.of_all_nodes()).get(bound.tres)
    at_least = bound.name == "MinTRESPJ"
    if asked is None and not (at_least and bound.tres.startswith("gres/")):
        return
    asked = asked or 0
    if asked >= bound.limit if at_least else asked <= bound.limit:
        return
    setting, given, what = _setting(bound, request, per_node=per_node)
    of_each = " per node" if per_node else ""
    most = "requires at least" if at_least else "allows a job at most"
    message = (
        f"{setting}={given}: {bound.whose} {most} {bound.text} {what}{of_each}, and this job "
        f"asks for {asked}; ask for {'more' if at_least else 'fewer'}"
    )
    fitting = "" if at_least else _fits_with(bound, request, demand, bound.limit, per_node=per_node)
    yield _finding(Verdict.NEVER, bound, message, fitting)


def _at_once(bound: Bound, request: Request, demand: Demand) -> Iterator[Finding]:
    asked = demand.of_all_nodes().get(bound.tres)
    if not asked:
        return
    setting, given, what = _setting(bound, request)
    whose = bound.whose + (f" (per {WHO[bound.name[-2:]]})" if bound.name[-2:] in WHO else "")
    if asked > bound.limit:
        message = (
            f"{setting}={given}: {whose} allows at most {bound.text} {what} at once, and this job "
            f"asks for {asked}; ask for fewer"
        )
        yield _finding(
            Verdict.NEVER, bound, message, _fits_with(bound, request, demand, bound.limit)
        )
    elif bound.used is not None and bound.used + asked > bound.limit:
        message = (
            f"{whose} allows {bound.text} {what} at once, {bound.used} are in use, and this job "
            f"asks for {asked}: it waits until other jobs end"
        )
        left = max(0, bound.limit - bound.used)
        yield _finding(Verdict.WAITS, bound, message, _fits_with(bound, request, demand, left))


def _of_time(
    bound: Bound, request: Request, demand: Demand, *, used: int | None
) -> Iterator[Finding]:
    count = demand.of_all_nodes().get(bound.tres)
    if not count:
        return
    what = WORDS.get(bound.tres, bound.tres)
    asked = None if demand.minutes is None else count * demand.minutes
    if asked is None or asked > bound.limit:
        most = duration(bound.limit // count * 60)
        message = (
            f"TIME={request.time}: {bound.whose} allows at most {bound.text} minutes x {what} "
            f"({_name(bound)}), which is {most} for this job; ask for less"
        )
        fits_with = f"TIME={most}" if bound.limit >= count else ""
        yield _finding(Verdict.NEVER, bound, message, fits_with)
    elif used is not None and used + asked > bound.limit:
        left = max(0, bound.limit - used)
        message = (
            f"{bound.whose} allows {bound.text} minutes x {what} ({_name(bound)}), {used} are "
            f"{'in use' if 'Run' in bound.name else 'used up'}, and this job asks for {asked}: it "
            f"waits until {'other jobs need less' if 'Run' in bound.name else 'usage decays'}"
        )
        fits_with = f"TIME={duration(left // count * 60)}" if left >= count else ""
        yield _finding(Verdict.WAITS, bound, message, fits_with)


def _until_used_up(bound: Bound, demand: Demand, count: int) -> Iterator[Finding]:
    """Find whether the minutes of a group are used up, or will be before a job ends."""
    if bound.used is None:
        return
    if bound.used >= bound.limit:
        message = (
            f"{bound.whose} has used up its {bound.text} ({_name(bound)}); the job waits until "
            "usage decays, or ask the account's coordinator"
        )
        yield _finding(Verdict.WAITS, bound, message, "")
    elif demand.minutes is None or bound.used + count * demand.minutes > bound.limit:
        left = duration((bound.limit - bound.used) // count * 60)
        message = (
            f"{bound.whose} has enough minutes for {left} of this job ({_name(bound)}: "
            f"{bound.used} of {bound.text} are used up); Slurm then ends it"
        )
        yield _finding(Verdict.FITS, bound, message, "")


def _wall(bound: Bound, request: Request, demand: Demand) -> Iterator[Finding]:
    if demand.minutes is None or demand.minutes > bound.limit:
        message = (
            f"TIME={request.time}: {bound.whose} allows at most {bound.text} in total (GrpWall)"
        )
        yield _finding(Verdict.NEVER, bound, message, f"TIME={duration(bound.limit * 60)}")
    elif bound.used is not None and bound.used + demand.minutes > bound.limit:
        left = max(0, bound.limit - bound.used)
        message = (
            f"{bound.whose} allows {bound.text} of run time in total (GrpWall), and "
            f"{duration(bound.used * 60)} are used up; the job waits until usage decays"
        )
        yield _finding(Verdict.WAITS, bound, message, f"TIME={duration(left * 60)}" if left else "")


def _jobs(bound: Bound, verb: str) -> Iterator[Finding]:
    whose = bound.whose + (f" (per {WHO[bound.name[-2:]]})" if bound.name[-2:] in WHO else "")
    if bound.limit == 0:
        message = f"{whose} allows no jobs ({_name(bound)}); choose another, or ask the site"
        yield _finding(Verdict.NEVER, bound, message, "")
    elif bound.used is not None and bound.used >= bound.limit:
        many = f"{bound.limit} job{'s' if bound.limit != 1 else ''}"
        until = "it waits until one ends"
        if verb == "queued":
            until = "sbatch refuses another until one ends"
        message = f"{whose} allows {many} {verb} at once, and {bound.used} are: {until}"
        yield _finding(Verdict.WAITS, bound, message, "")


# ---- words ----------------------------------------------------------------------------------


def _finding(verdict: Verdict, bound: Bound, message: str, fits_with: str) -> Finding:
    if verdict is Verdict.NEVER:
        found = never(message, _name(bound), bound.whose)
        return replace(found, fits_with=fits_with)
    return Finding(
        verdict=verdict,
        limit=_name(bound),
        whose=bound.whose,
        message=message,
        fits_with=fits_with,
    )


def _name(bound: Bound) -> str:
    return f"{bound.name} {bound.tres}".strip()


def _is_per_job(bound: Bound) -> bool:
    return bound.name.endswith(("PJ", "PN"))


def _setting(bound: Bound, request: Request, *, per_node: bool = False) -> tuple[str, int, str]:
    """Return the variable that a limit is about, its value, and what is counted."""
    kind = bound.tres.split(":")[0]
    what = WORDS.get(kind, bound.tres)
    if ":" in bound.tres:
        what += f" of type {bound.tres.partition(':')[2]}"
    if SETTINGS.get(kind) == "GPUS" or (per_node and request.gpus_per_node):
        return "GPUS", request.gpus_per_node, what
    return "NODES", request.num_nodes, what


def _fits_with(
    bound: Bound, request: Request, demand: Demand, most: int, *, per_node: bool = False
) -> str:
    """Return the largest request of this shape that stays within a limit."""
    each = demand.of_a_node().get(bound.tres, 0)
    if not each:
        return ""
    if not per_node and most >= each:
        return f"NODES={most // each}"
    gpus = request.gpus_per_node
    if gpus > 1:
        # CPUs and memory scale with the GPUs of a node.
        fewer = most * gpus // each
        if fewer:
            return (
                f"GPUS={fewer}" if per_node or request.num_nodes == 1 else f"NODES=1 GPUS={fewer}"
            )
    return ""
