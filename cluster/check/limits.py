"""Which jobs a site's Slurm would never run, and which would have to wait, by its limits.

`make submit` refuses jobs with a NEVER finding, and `make check JOB=` shows all findings: both use
the same rules.
"""

from __future__ import annotations

import getpass
import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.check.account import association_of, of_account, qos_of
from cluster.check.bounds import Holders, over_bounds
from cluster.check.choice import Choice
from cluster.check.demand import Demand, demand_of
from cluster.check.finding import Finding, Verdict, never
from cluster.check.partition_limits import over_access, over_closure, over_sizes
from cluster.plan.request import Request
from cluster.site.settings import Site
from cluster.slurm import accounting, nodes, partitions
from cluster.slurm.associations import Accounting
from cluster.slurm.call import Slurm
from cluster.slurm.nodes import Node
from cluster.slurm.partitions import Partition
from cluster.slurm.refusals import ControllerUnreachable, SlurmError
from runfolder.errors import UserError, did_you_mean, printable


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules for jobs, as Slurm shows them; None and `unknown`: what it does not show."""

    user: str
    config: Mapping[str, str]
    partitions: Mapping[str, Partition]
    nodes: Mapping[str, Node] | None
    accounting: Accounting
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A job under the rules."""

    findings: list[Finding]
    remarks: list[str]
    """What else the user should know, including what is unknown."""
    demand: Demand | None
    """None: there is no such partition."""
    account: str = ""
    qos: str = ""

    @property
    def notes(self) -> list[str]:
        """All notes on a job that is queued."""
        return [finding.message for finding in self.findings] + self.remarks

    @property
    def for_trial(self) -> list[str]:
        """Additional options for sbatch --test-only."""
        return self.demand.for_trial() if self.demand else []


def check(rules: Rules, site: Site, request: Request) -> Judged:
    """Return the findings on a job that can run at some time; raise for one that never can.

    Slurm's own `--test-only` accepts jobs that a limit then holds forever.

    Raises:
        UserError: the job can never run; names the limit, and where it is set.
    """
    judged = judge(rules, Choice.from_site(site), request)
    for finding in judged.findings:
        if finding.verdict is Verdict.NEVER:
            raise UserError(finding.message)
    return judged


def read(queue: Slurm) -> Rules:
    """Ask Slurm for the rules, each kind once.

    Raises:
        SlurmError: it does not show its settings or partitions.
    """
    config = queue.config()
    user = user_name()
    unknown: list[str] = []
    known: dict[str, Node] | None = None
    try:
        known = nodes.read(queue)
    except ControllerUnreachable:
        raise
    except SlurmError as error:
        unknown.append(f"nodes: scontrol show node: {printable(str(error))}")
    if known is not None and not known:
        known = None
        unknown.append("nodes: scontrol shows none")
    return Rules(
        user=user,
        config=config,
        partitions=partitions.read(queue),
        nodes=known,
        accounting=accounting.read(queue, config, user),
        unknown=tuple(unknown),
    )


def user_name() -> str:
    """Return our user name as Slurm knows it; USER and LOGNAME may be wrong."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return getpass.getuser()


def no_such_partition(rules: Rules, chosen: Choice, name: str) -> str:
    """Return the message about a partition that Slurm does not show."""
    return (
        f"{chosen.where}: slurm.partition '{name}': there is no such partition"
        f"{did_you_mean(name, rules.partitions)}"
    )


def judge(rules: Rules, chosen: Choice, request: Request) -> Judged:
    """Check a job against all rules."""
    name = chosen.partition
    remarks = [f"unknown: {words}" for words in rules.unknown]
    if chosen.not_reckoned_with:
        flags = ", ".join(chosen.not_reckoned_with)
        remarks.append(f"not taken into account: {flags} of slurm.sbatch_flags in {chosen.where}")
    if chosen.ignored:
        remarks.append(
            f"ignored from your environment: {', '.join(chosen.ignored)}; "
            "set it in slurm.sbatch_flags of site.toml"
        )
    if "," in name:
        # sbatch uses the one where the job starts first.
        remarks.append(f"not checked: which of the partitions {name} the job would get")
        return Judged(findings=[], remarks=remarks, demand=None)
    partition = rules.partitions.get(name)
    if partition is None:
        message = no_such_partition(rules, chosen, name)
        return Judged(findings=[never(message, "Partition", "")], remarks=remarks, demand=None)
    remarks += [f"unknown: {key} of partition {name}" for key in partition.unknown]
    demand = demand_of(request, partition, chosen, rules.config, rules.nodes)
    account, qos, found = of_account(rules.accounting, chosen)
    findings = [
        *over_access(partition, chosen, rules.user),
        *over_sizes(partition, request, demand, chosen, qos),
        *over_closure(partition, chosen, account, qos.name if qos else chosen.qos),
        *found,
    ]
    kept = rules.accounting
    remarks += [f"unknown: {words}" for words in kept.unknown]
    if not kept.binds:
        remarks.append("this Slurm does not enforce accounts, so you have no limits to check")
    elif kept.limits_bind and not any(f.verdict is Verdict.NEVER for f in found):
        association = association_of(kept, chosen, account)
        holders = Holders.of(association, qos_of(kept, partition.qos), qos)
        found = list(over_bounds(holders, request, demand, safe="safe" in kept.enforced))
        findings += found
        if partition.qos and partition.qos not in kept.qos:
            remarks.append(f"unknown: limits of partition {name}'s QOS {partition.qos}")
        if association is not None and association.above is None:
            remarks.append(f"unknown: limits of the accounts above {association.account}")
        if qos is None and not kept.is_hidden:
            remarks.append("unknown: which QOS the job gets, and that QOS's limits")
        remarks += [f"unknown: {words}" for words in holders.unknown_use()]
        remarks += demand.unknown
    return Judged(
        # The most severe first, and of equals the one that was found first.
        findings=sorted(findings, key=lambda finding: -finding.verdict),
        remarks=list(dict.fromkeys(remarks)),
        demand=demand,
        account=account,
        qos=qos.name if qos else "",
    )
