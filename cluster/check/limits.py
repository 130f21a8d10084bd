"""What a site's Slurm would never run, and what it would let wait, by its limits.

`make submit` refuses what these call NEVER, and `make check JOB=` shows all of them: one truth.
"""

from __future__ import annotations

import getpass
import grp
import os
import pwd
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster import slurm
from cluster.check import accounting, choice, nodes, partitions
from cluster.check.associations import Accounting, Association, Qos
from cluster.check.bounds import Holders, over_bounds
from cluster.check.choice import Choice
from cluster.check.demand import Demand
from cluster.check.demand import of as demand_of
from cluster.check.finding import Finding, Verdict, never, over_time
from cluster.check.nodes import Node
from cluster.check.partitions import Partition
from cluster.refusals import ControllerUnreachable, SlurmError
from cluster.request import Request
from cluster.site import Site
from runfolder.errors import UserError, did_you_mean, printable


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Who decides over jobs, as Slurm tells it; None and `unknown`: what it does not."""

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
    """What the user should know beside them; also what is unknown."""
    demand: Demand | None
    """None: there is no such partition."""
    account: str = ""
    qos: str = ""

    @property
    def notes(self) -> list[str]:
        """All that is to be said of a job that is queued."""
        return [finding.message for finding in self.findings] + self.remarks

    @property
    def for_trial(self) -> list[str]:
        """What sbatch --test-only is to be told besides."""
        return self.demand.for_trial() if self.demand else []


def check(rules: Rules, site: Site, request: Request) -> Judged:
    """Return what is found of a job that can run some day; of those that never can, say why.

    Slurm's own `--test-only` lets limits pass that then hold the job for ever.

    Raises:
        UserError: it can never run; with the limit, and where it is.
    """
    judged = judge(rules, choice.of(site), request)
    for finding in judged.findings:
        if finding.verdict is Verdict.NEVER:
            raise UserError(finding.message)
    return judged


def read(queue: slurm.Slurm) -> Rules:
    """Ask Slurm for the rules, each kind once.

    Raises:
        SlurmError: it tells nothing of its settings or partitions.
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
    """Return who we are to Slurm; USER and LOGNAME may say anything."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return getpass.getuser()


def judge(rules: Rules, chosen: Choice, request: Request) -> Judged:
    """Hold a job against all rules."""
    name = chosen.partition
    remarks = [f"unknown: {words}" for words in rules.unknown]
    if chosen.not_reckoned_with:
        flags = ", ".join(chosen.not_reckoned_with)
        remarks.append(f"not reckoned with: {flags} of slurm.sbatch_flags in {chosen.where}")
    if chosen.ignored:
        remarks.append(
            f"ignored from your environment: {', '.join(chosen.ignored)}; "
            "set it in slurm.sbatch_flags of site.toml"
        )
    if "," in name:
        # sbatch takes the one where it starts first.
        remarks.append(f"not checked: which of the partitions {name} the job would get")
        return Judged(findings=[], remarks=remarks, demand=None)
    partition = rules.partitions.get(name)
    if partition is None:
        message = (
            f"{chosen.where}: slurm.partition '{name}': there is no such partition"
            f"{did_you_mean(name, rules.partitions)}"
        )
        return Judged(findings=[never(message, "Partition", "")], remarks=remarks, demand=None)
    remarks += [f"unknown: {key} of partition {name}" for key in partition.unknown]
    demand = demand_of(request, partition, chosen, rules.config, rules.nodes)
    account, qos, found = of_account(rules.accounting, chosen)
    findings = [
        *_open(partition, chosen, rules.user),
        *_sizes(partition, request, demand, chosen, qos),
        *_closed(partition, chosen, account, qos.name if qos else chosen.qos),
        *found,
    ]
    kept = rules.accounting
    remarks += [f"unknown: {words}" for words in kept.unknown]
    if not kept.binds:
        remarks.append("this Slurm enforces no accounts: no limits of yours to check")
    elif kept.limits_bind and not any(f.verdict is Verdict.NEVER for f in found):
        association = _association_of(kept, chosen, account)
        holders = Holders.of(association, _qos_of(kept, partition.qos), qos)
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
        # What hinders most comes first, and of that what was found first.
        findings=sorted(findings, key=lambda finding: -finding.verdict),
        remarks=list(dict.fromkeys(remarks)),
        demand=demand,
        account=account,
        qos=qos.name if qos else "",
    )


# ---- account and QOS ------------------------------------------------------------------------


def of_account(kept: Accounting, chosen: Choice) -> tuple[str, Qos | None, list[Finding]]:
    """Return the account and the QOS that a job gets, and whether it may have them."""
    findings: list[Finding] = []
    if not kept.binds or kept.is_hidden:
        return chosen.account, kept.qos.get(chosen.qos), findings
    here = _here(kept, chosen)
    accounts = sorted({association.account for association in here})
    if not accounts:
        message = f"user {kept.user} has no account on this cluster; ask the site for one"
        if kept.associations:
            others = ", ".join(sorted({a.partition for a in kept.associations}))
            message = (
                f"{chosen.where}: slurm.partition '{chosen.partition}': you have no account for "
                f"it; you have for {others}"
            )
        return "", None, [never(message, "Account", f"user {kept.user}")]
    account = chosen.account or kept.default_account
    if not account and len(accounts) == 1:
        account = accounts[0]
    if chosen.account and chosen.account.lower() not in accounts:
        message = (
            f"{chosen.where}: slurm.account '{chosen.account}' is not one of yours: "
            f"{', '.join(accounts)}"
        )
        return chosen.account, None, [never(message, "Account", "", accounts, "slurm.account")]
    association = _association_of(kept, chosen, account)
    if association is None:
        message = (
            f"{chosen.where}: your default account {account} is not for partition "
            f"{chosen.partition}; set slurm.account to one of {', '.join(accounts)}"
        )
        return account, None, [never(message, "Account", "", accounts, "slurm.account")]
    known = association.qos
    name = chosen.qos or association.default_qos
    if not name and known is not None:
        # As the controller does for who has no default.
        name = known[0] if len(known) == 1 else ("normal" if "normal" in known else "")
    if known is not None and kept.qos_binds and chosen.qos and chosen.qos not in known:
        message = (
            f"{chosen.where}: slurm.qos '{chosen.qos}' is not one of yours: "
            f"{', '.join(sorted(known))}"
        )
        findings.append(never(message, "QOS", "", sorted(known), "slurm.qos"))
    return account, _qos_of(kept, name), findings


def _here(kept: Accounting, chosen: Choice) -> list[Association]:
    # In all partitions where none is named.
    return [a for a in kept.associations if a.partition in ("", chosen.partition)]


def _association_of(kept: Accounting, chosen: Choice, account: str) -> Association | None:
    mine = [a for a in _here(kept, chosen) if a.account == account.lower()]
    # The one of this very partition before that of all.
    return max(mine, key=lambda association: association.partition, default=None)


def _qos_of(kept: Accounting, name: str) -> Qos | None:
    return kept.qos.get(name) if name else None


# ---- the partition --------------------------------------------------------------------------


def _open(partition: Partition, chosen: Choice, user: str) -> Iterator[Finding]:
    where = f"{chosen.where}: slurm.partition '{partition.name}'"
    whose = f"partition {partition.name}"
    if partition.state not in ("UP", "unknown"):
        message = f"{where}: is {printable(partition.state)}; choose another, or ask the site"
        yield never(message, "State", whose)
    is_root = user == "root"
    if partition.is_for_root and not is_root:
        yield never(f"{where}: is for root alone; choose another", "RootOnly", whose)
    if partition.wants_reservation and not chosen.reservation:
        message = f"{where}: takes jobs with a reservation alone; set SBATCH_RESERVATION"
        yield never(message, "ReqResv", whose)
    if partition.allowed_groups is not None and not is_root:
        mine = _groups(user)
        if mine is not None and not mine & set(partition.allowed_groups):
            groups = ", ".join(partition.allowed_groups)
            yield never(f"{where}: is for the groups {groups} alone", "AllowGroups", whose)


def _groups(user: str) -> set[str] | None:
    names = set()
    try:
        for number in os.getgrouplist(user, os.getgid()):
            names.add(grp.getgrgid(number).gr_name)
    except (KeyError, OSError):
        return None
    return names


def _sizes(
    partition: Partition, request: Request, demand: Demand, chosen: Choice, qos: Qos | None
) -> Iterator[Finding]:
    """Find whether the partition ever gives that much, and whether it has such nodes."""
    whose = f"partition {partition.name}"
    # A QOS may free its jobs of these.
    flags = qos.flags if qos else ()
    most = partition.total_nodes
    if partition.max_nodes is not None and "PartitionMaxNodes" not in flags:
        most = min(most, partition.max_nodes)
    if request.num_nodes > most and "TotalNodes" not in partition.unknown:
        verb = "has" if most == partition.total_nodes else "gives a job at most"
        message = (
            f"NODES={request.num_nodes}: {whose} {verb} {most}; ask for fewer, or another partition"
        )
        yield never(message, "MaxNodes", whose, [str(most)] if most else [], "NODES")
    if request.num_nodes < partition.min_nodes and "PartitionMinNodes" not in flags:
        message = (
            f"NODES={request.num_nodes}: {whose} gives a job at least {partition.min_nodes}; ask "
            "for more, or another partition"
        )
        yield never(message, "MinNodes", whose, [str(partition.min_nodes)], "NODES")
    if "PartitionTimeLimit" not in flags and (
        over := over_time(request, partition.max_time, whose, "MaxTime")
    ):
        yield over
    if (cpus := partition.max_cpus_per_node) is not None and demand.cpus > cpus:
        message = (
            f"a job asks for {demand.cpus} CPUs of a node, and {whose} gives at most {cpus}; set "
            "slurm.cpus_per_node to that"
        )
        yield never(message, "MaxCPUsPerNode", whose, [str(cpus)], "slurm.cpus_per_node")
    memory = partition.max_memory_per_node_mb
    if memory is not None and request.memory_per_node_mb > memory:
        message = (
            f"a job asks for {request.memory_per_node_mb} MB of a node, and {whose} gives at most "
            f"{memory}; set slurm.memory_per_node_mb to that"
        )
        yield never(message, "MaxMemPerNode", whose, [str(memory)], "slurm.memory_per_node_mb")
    fitting = demand.fitting
    if fitting is not None and len(fitting) < request.num_nodes <= most:
        yield _too_large(partition, request, demand, chosen, len(fitting))


def _too_large(
    partition: Partition, request: Request, demand: Demand, chosen: Choice, fitting: int
) -> Finding:
    many = f"{fitting} of its nodes have" if fitting else "none of its nodes has"
    message = f"partition {partition.name}: {many} what the job asks of each: {demand}"
    flags = {
        "constraint": chosen.constraint,
        "nodelist": chosen.nodelist,
        "exclude": chosen.exclude,
    }
    if given := " ".join(f"--{name}={value}" for name, value in flags.items() if value):
        message += f", with {given} of slurm.sbatch_flags in {chosen.where}"
    fits_with = ""
    if fitting:
        fits_with = f"NODES={fitting}"
    elif demand.most_gpus is not None and request.gpus_per_node > demand.most_gpus:
        fits_with = f"GPUS={demand.most_gpus}"
    elif demand.most_cpus and demand.cpus > demand.most_cpus:
        fits_with = f"slurm.cpus_per_node = {demand.most_cpus}"
    elif demand.most_memory_mb and request.memory_per_node_mb > demand.most_memory_mb:
        fits_with = f"slurm.memory_per_node_mb = {demand.most_memory_mb}"
    return Finding(
        verdict=Verdict.NEVER,
        limit="Nodes",
        whose=f"partition {partition.name}",
        message=message,
        fits_with=fits_with,
    )


def _closed(partition: Partition, chosen: Choice, account: str, qos: str) -> Iterator[Finding]:
    where = f"{chosen.where}: slurm.partition '{partition.name}'"
    for kind, name, allowed, denied, limit in (
        ("account", account, partition.allowed_accounts, partition.denied_accounts, "Accounts"),
        ("QOS", qos, partition.allowed_qos, partition.denied_qos, "Qos"),
    ):
        if name and allowed is not None and name not in allowed:
            message = f"{where}: is closed to {kind} {name}; open to {', '.join(allowed)}"
            setting = f"slurm.{kind.lower()}"
            yield never(message, f"Allow{limit}", f"partition {partition.name}", allowed, setting)
        elif name and name in denied:
            message = f"{where}: is closed to {kind} {name}; choose another"
            yield never(message, f"Deny{limit}", f"partition {partition.name}")
