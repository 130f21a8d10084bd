"""What site.toml says about the cluster, beside what Slurm says: `make check-site`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from cluster.check.account import association_of, of_account
from cluster.check.choice import Choice
from cluster.check.demand import nodes_of, selects_of
from cluster.check.finding import Finding
from cluster.check.limits import Rules, no_such_partition
from cluster.check.partition_limits import over_access, over_closure
from cluster.plan.request import SIGNAL_EARLY_S, least_s
from cluster.site.settings import Site
from cluster.slurm import hosts, notation
from cluster.slurm.nodes import Node
from cluster.slurm.partitions import Partition
from cluster.slurm.reasons import duration


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The settings that were compared, and the differences."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """The setting, what the file says, and what Slurm says."""
    faults: list[str] = field(default_factory=list)
    """With these no job runs, or none that uses a whole node."""
    notes: list[str] = field(default_factory=list)
    """What works, but may not be meant."""
    not_compared: list[str] = field(default_factory=list)
    """Which settings, and why."""


def compare(rules: Rules, site: Site) -> Comparison:
    """Compare [slurm] of site.toml with the rules that Slurm shows."""
    found = Comparison()
    chosen = Choice.from_site(site)
    names = chosen.partition.split(",")
    known = [rules.partitions[name] for name in names if name in rules.partitions]
    each = [_in_partition(partition, chosen, rules, site) for partition in known]
    # Of several partitions, a job may start in any: one that is right will do.
    one_is_right = any(not one.faults for one in each)
    for one in each:
        found.rows.extend(one.rows)
        (found.notes if one_is_right else found.faults).extend(one.faults)
        found.notes.extend(one.notes)
        found.not_compared.extend(one.not_compared)
    found.faults.extend(
        no_such_partition(rules, chosen, name) for name in names if name not in rules.partitions
    )
    if not known:
        found.not_compared.append("all else in [slurm]: it depends on the partition")
    return found


def _in_partition(partition: Partition, chosen: Choice, rules: Rules, site: Site) -> Comparison:
    found = Comparison()
    chosen = replace(chosen, partition=partition.name)
    _partition(found, partition, chosen, rules)
    _account(found, partition, chosen, rules)
    _time(found, partition, site)
    own, unknown = nodes_of(partition, chosen, rules.nodes)
    if own is None:
        reasons = "; ".join(word.removeprefix("unknown: ") for word in unknown or rules.unknown)
        found.not_compared.append(f"CPUs, GPUs and memory of a node: {reasons}")
    elif own:
        _nodes(found, partition, own, site, rules)
    else:
        found.faults.append(_no_node(partition, chosen, rules))
    return found


def _partition(found: Comparison, partition: Partition, chosen: Choice, rules: Rules) -> None:
    state = f"{partition.state}, {_many(partition.total_nodes)}"
    found.rows.append(("slurm.partition", partition.name, state))
    found.faults.extend(map(_line, over_access(partition, chosen, rules.user)))
    found.not_compared.extend(f"{key} of partition {partition.name}" for key in partition.unknown)


def _line(finding: Finding) -> str:
    write = f"; write {finding.fits_with}" if finding.fits_with.startswith("slurm.") else ""
    return finding.message + write


def _account(found: Comparison, partition: Partition, chosen: Choice, rules: Rules) -> None:
    kept = rules.accounting
    settings = "slurm.account, slurm.qos"
    if not kept.binds:
        found.not_compared.append(f"{settings}: this Slurm does not enforce accounts")
        return
    if kept.is_hidden:
        found.not_compared.append(f"{settings}: {'; '.join(kept.unknown)}")
        return
    account, qos, wrong = of_account(kept, chosen)
    wrong += over_closure(partition, chosen, account, qos.name if qos else chosen.qos)
    found.faults.extend(map(_line, wrong))
    mine = sorted({association.account for association in kept.associations})
    found.rows.append(("slurm.account", chosen.account or f"(default: {account})", ", ".join(mine)))
    association = association_of(kept, chosen, account)
    if association is None:
        return
    if association.qos is None:
        found.not_compared.append("slurm.qos: Slurm does not show which QOS you may use")
    else:
        default = f"(default: {qos.name if qos else 'none'})"
        found.rows.append(("slurm.qos", chosen.qos or default, ", ".join(association.qos)))


def _time(found: Comparison, partition: Partition, site: Site) -> None:
    if "MaxTime" in partition.unknown:
        return
    save_s, most = site.slurm.save_s, notation.seconds(partition.max_time)
    limit = f"a job may take {partition.max_time.lower()}"
    found.rows.append(("slurm.save_s", str(save_s), limit))
    if most is not None and least_s(save_s) > most:
        fits = min(most // 2, most - SIGNAL_EARLY_S)
        found.faults.append(
            f"{site.source}: slurm.save_s: {save_s} needs jobs of at least "
            f"{duration(least_s(save_s))}, and partition {partition.name} allows "
            f"{partition.max_time}; "
            + (f"write slurm.save_s = {fits}" if fits > 0 else "choose another partition")
        )


def _no_node(partition: Partition, chosen: Choice, rules: Rules) -> str:
    own = [node for node in (rules.nodes or {}).values() if partition.name in node.partitions]
    if not own:
        return f"{chosen.where}: slurm.partition '{partition.name}': has no nodes; choose another"
    has = ", ".join(sorted({feature for node in own for feature in node.features})) or "none"
    return (
        f"{chosen.where}: slurm.sbatch_flags: no node of partition {partition.name} has what they "
        f"ask for; its nodes are {hosts.compact(node.name for node in own)}, their features: {has}"
    )


# ---- what a node has ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Size:
    """A setting of what a node has."""

    setting: str
    wanted: int
    what: str
    of: Callable[[Node], int]
    """What a job can have of a node."""


def _sizes(partition: Partition, kind: str, site: Site) -> Iterator[_Size]:
    def gpus(node: Node) -> int:
        return node.gpus.get(kind, 0) if kind else sum(node.gpus.values())

    def cpus(node: Node) -> int:
        return min(node.cpus, partition.max_cpus_per_node or node.cpus)

    def memory(node: Node) -> int:
        return min(node.memory_mb, partition.max_memory_per_node_mb or node.memory_mb)

    wanted = site.slurm
    yield _Size(setting="slurm.gpus_per_node", wanted=wanted.gpus_per_node, what="GPUs", of=gpus)
    yield _Size(setting="slurm.cpus_per_node", wanted=wanted.cpus_per_node, what="CPUs", of=cpus)
    if mb := wanted.memory_per_node_mb:
        yield _Size(setting="slurm.memory_per_node_mb", wanted=mb, what="MB of memory", of=memory)


def _nodes(
    found: Comparison, partition: Partition, own: list[Node], site: Site, rules: Rules
) -> None:
    kind = _gpu_type(found, partition, own, site)
    sizes = list(_sizes(partition, kind, site))
    is_too_large = False
    for size in sizes:
        counts = Counter(map(size.of, own))
        least, most = min(counts), max(counts)
        # Sites differ in what a CPU is.
        meaning = _meaning(own) if size.what == "CPUs" else ""
        has = ", ".join(f"{count} on {_many(number)}" for count, number in counts.most_common())
        found.rows.append((size.setting, str(size.wanted), has + meaning))
        if size.wanted > most:
            is_too_large = True
            found.faults.append(
                f"{site.source}: {size.setting}: {size.wanted}, but a node of partition "
                f"{partition.name} gives a job at most {most} {size.what}{meaning}; write "
                f"{size.setting} = {most}"
            )
        elif size.wanted < least:
            found.notes.append(
                f"{size.setting}: {size.wanted}, and a job could have {least} {size.what} of each "
                f"node{meaning}; to use them, write {size.setting} = {least}"
            )
    if site.slurm.memory_per_node_mb and "MEMORY" not in selects_of(partition, rules.config):
        found.notes.append(
            f"slurm.memory_per_node_mb: partition {partition.name} does not allocate memory, so "
            "this limits nothing"
        )
    fitting = [node for node in own if all(size.wanted <= size.of(node) for size in sizes)]
    if not fitting and not is_too_large:
        best = max(own, key=lambda node: [size.of(node) for size in sizes])
        write = ", ".join(f"{size.setting} = {size.of(best)}" for size in sizes)
        found.faults.append(
            f"{site.source}: slurm: no node of partition {partition.name} has all of this at once; "
            f"write what {best.name} has: {write}"
        )
    elif 0 < len(fitting) < len(own):
        names = hosts.compact(node.name for node in fitting)
        found.notes.append(f"only {len(fitting)} of {_many(len(own))} have all of this: {names}")


def _gpu_type(found: Comparison, partition: Partition, own: list[Node], site: Site) -> str:
    """Compare the type of GPU; return the one to count, "" for all of them."""
    wanted = site.slurm.gpu_type
    types = sorted({kind for node in own for kind in node.gpus if kind})
    found.rows.append(("slurm.gpu_type", wanted or "(any)", ", ".join(types) or "no types"))
    if wanted and wanted not in types:
        write = " or ".join(f'"{kind}"' for kind in types) or '""'
        found.faults.append(
            f"{site.source}: slurm.gpu_type: '{wanted}', but Slurm has "
            f"{', '.join(types) or 'no types of GPUs'} in partition {partition.name}; write "
            f"slurm.gpu_type = {write}"
        )
    return wanted if wanted in types else ""


def _meaning(own: list[Node]) -> str:
    """Return whether Slurm counts cores or hardware threads as CPUs; "" where both are the same."""
    for node in own:
        if node.threads_per_core > 1 and node.cores:
            counted = "hardware threads" if node.cpus > node.cores else "cores"
            return (
                f" ({counted}: {node.name} has {node.cores} cores with {node.threads_per_core} "
                "threads each)"
            )
    return ""


def _many(number: int) -> str:
    return f"{number} node{'s' if number != 1 else ''}"
