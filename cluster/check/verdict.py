"""Will a job fit: now, later, or never; under which limit, and what would fit instead."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.check import limits, room
from cluster.check.choice import Choice
from cluster.check.finding import Finding, Verdict
from cluster.plan.request import Request, sbatch_command
from cluster.site.places import here
from cluster.site.settings import Site
from cluster.slurm import reservations
from cluster.slurm.call import PASSED, Slurm
from cluster.slurm.reasons import clock
from cluster.slurm.refusals import POLICY, ControllerUnreachable, SlurmError, Trial
from cluster.slurm.reservations import epoch
from runfolder.errors import printable

# A start that is this close counts as now: the scheduler works in cycles.
NOW_S = 60


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The verdict on a job."""

    verdict: Verdict
    findings: list[Finding] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    start: str = ""
    """When Slurm expects it to start, local time in ISO format; empty: unknown."""
    nodes: str = ""
    request: Request | None = None
    account: str = ""
    qos: str = ""
    partition: str = ""

    def facts(self) -> dict[str, Any]:
        """Return it for programs (docs/check.md has the schema)."""
        words = {Verdict.FITS: "fits now", Verdict.WAITS: "will wait", Verdict.NEVER: "never"}
        wanted = self.request
        return {
            "verdict": int(self.verdict),
            "word": words[self.verdict],
            "findings": [
                {
                    "verdict": int(finding.verdict),
                    "limit": finding.limit,
                    "whose": printable(finding.whose),
                    "message": printable(finding.message),
                    "fits_with": printable(finding.fits_with) or None,
                }
                for finding in self.findings
            ],
            "expected_start": self.start or None,
            "expected_nodes": printable(self.nodes) or None,
            "request": None
            if wanted is None
            else {
                "num_nodes": wanted.num_nodes,
                "gpus_per_node": wanted.gpus_per_node,
                "processes_per_node": wanted.processes_per_node,
                "cpus_per_node": wanted.cpus_per_node,
                "memory_per_node_mb": wanted.memory_per_node_mb or None,
                "time": wanted.time,
            },
            "partition": printable(self.partition),
            "account": printable(self.account) or None,
            "qos": printable(self.qos) or None,
            "remarks": [printable(remark) for remark in self.remarks],
        }


def on(queue: Slurm, site: Site, request: Request, name: str) -> Answer:
    """Return the verdict on a job of this size.

    Raises:
        SlurmError: Slurm does not answer, so there is no verdict.
    """
    chosen = Choice.from_site(site)
    rules = limits.read(queue)
    judged = limits.judge(rules, chosen, request)
    findings, remarks = list(judged.findings), list(judged.remarks)
    start, nodes = "", ""
    if not any(finding.verdict is Verdict.NEVER for finding in findings):
        ahead = _ahead(queue, rules, chosen, remarks)
        findings += _room(queue, rules, chosen, judged, ahead, remarks)
        trial = try_it(queue, site, request, name, judged.for_trial)
        start, nodes = trial.start, trial.nodes
        findings += _as_slurm_says(trial, findings, ahead, remarks)
        findings = _unless_it_starts(trial, findings, rules, judged, remarks)
    verdict = max((finding.verdict for finding in findings), default=Verdict.FITS)
    # Slurm's estimate takes only nodes into account, not other limits or gaps between planned jobs.
    others = any(finding.verdict and finding.limit not in _OF_ROOM for finding in findings)
    if others or (verdict is Verdict.FITS and _is_later(start)):
        start, nodes = "", ""
    return Answer(
        verdict=verdict,
        findings=sorted(findings, key=lambda finding: -finding.verdict),
        remarks=remarks,
        start=start if epoch(start) is not None else "",
        nodes=nodes,
        request=request,
        account=judged.account,
        qos=judged.qos,
        partition=chosen.partition,
    )


# Findings about nodes, which Slurm's estimate takes into account.
_OF_ROOM = {"Resources", "Nodes", "Reservation", "Priority", "Start"}


def _room(
    queue: Slurm,
    rules: limits.Rules,
    chosen: Choice,
    judged: limits.Judged,
    ahead: list[room.Waiting],
    remarks: list[str],
) -> list[Finding]:
    demand = judged.demand
    if demand is None or demand.fitting is None or rules.nodes is None:
        return []
    kept: dict[str, reservations.Reservation] = {}
    try:
        kept = reservations.read(queue)
    except ControllerUnreachable:
        raise
    except SlurmError as error:
        remarks.append(f"unknown: reservations: {printable(str(error))}")
    return list(
        room.look(
            demand,
            rules.nodes,
            chosen,
            kept,
            ahead,
            rules.user,
            judged.account,
        )
    )


def _ahead(
    queue: Slurm, rules: limits.Rules, chosen: Choice, remarks: list[str]
) -> list[room.Waiting]:
    """Return the jobs that wait in the partition, as far as the site shows them."""
    if "jobs" in rules.config.get("PrivateData", ""):
        remarks.append(
            "unknown: other users' jobs that are ahead of it in the queue: this site hides them"
        )
    try:
        return room.waiting(queue, chosen.partition)
    except ControllerUnreachable:
        raise
    except SlurmError as error:
        remarks.append(f"unknown: which jobs wait in the partition: {printable(str(error))}")
        return []


def try_it(
    queue: Slurm, site: Site, request: Request, name: str, besides: Sequence[str] = ()
) -> Trial:
    """Have Slurm itself look at a job of this size, without queueing it."""
    words = sbatch_command(site, request, name=f"sluice-{name}", folder=here())
    # With the environment of `make submit`, because some of its variables set options of sbatch.
    passed = {key: value for key, value in os.environ.items() if PASSED.fullmatch(key)}
    return queue.trial([*words, *besides, str(here() / "slurm/train.sbatch")], passed)


def _as_slurm_says(
    trial: Trial, findings: list[Finding], ahead: list[room.Waiting], remarks: list[str]
) -> list[Finding]:
    """Return Slurm's own objection to the job, unless another finding explains it."""
    remarks.extend(f"sbatch says: {notice}" for notice in trial.notices)
    found = any(finding.verdict for finding in findings)
    # A limit on the number of queued jobs is temporary.
    full = any("SubmitJobs" in finding.limit for finding in findings)
    explained = (found and trial.is_for_now) or (full and trial.is_because_of(POLICY))
    if trial.refusal and not explained:
        # The nodes are free as far as we can see, so it is their type, or a rule of the site.
        lasts = not trial.is_for_now or trial.is_because_of("configuration is not available")
        message = f"sbatch would refuse it: {printable(trial.refusal)}"
        limit = "sbatch --test-only"
        verdict = Verdict.NEVER if lasts else Verdict.WAITS
        return [Finding(verdict=verdict, limit=limit, whose="Slurm", message=message)]
    if found or not _is_later(trial.start):
        return []
    if any(job.nodes for job in ahead):
        # Slurm backfills jobs that end before the planned starts of those that wait. Its estimate
        # does not consider that; the planned starts were taken into account above.
        remarks.append("it starts ahead of waiting jobs, at Slurm's next backfill cycle")
        return []
    message = "other jobs are ahead of it in the queue, or Slurm keeps its nodes for them"
    return [Finding(verdict=Verdict.WAITS, limit="Start", whose="Slurm", message=message)]


def _is_later(start: str) -> bool:
    begins = epoch(start)
    return begins is not None and begins > time.time() + NOW_S


def _unless_it_starts(
    trial: Trial,
    findings: list[Finding],
    rules: limits.Rules,
    judged: limits.Judged,
    remarks: list[str],
) -> list[Finding]:
    """Drop findings that the nodes are in use, if Slurm would share them or preempt their jobs."""
    begins = epoch(trial.start)
    if begins is None or begins > time.time() + NOW_S:
        return findings
    qos = rules.accounting.qos.get(judged.qos)
    preempts = qos is not None and qos.preempts
    # The estimate considers a job ahead in the queue only if that job is preempted.
    limits_of = ("Resources", "Priority") if preempts else ("Resources",)
    busy = [finding for finding in findings if finding.limit in limits_of]
    if busy and qos is not None and preempts:
        remarks.append(f"QOS {qos.name} preempts jobs of QOS {', '.join(qos.preempts)}")
    elif busy:
        remarks.append(
            "its nodes are in use, but the partition allows oversubscription or preemption"
        )
    return [finding for finding in findings if finding not in busy]


def words(answer: Answer) -> str:
    """Return the verdict in one line."""
    when = clock(answer.start)
    if answer.verdict is Verdict.FITS:
        return "fits now" + (f", on {printable(answer.nodes)}" if answer.nodes else "")
    if answer.verdict is Verdict.NEVER:
        return "can never run"
    return "will wait, " + (f"expected start {when}" if when else "expected start unknown")
