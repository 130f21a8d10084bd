"""Where a job would be queued, and what of a site's sbatch_flags decides which limits hold."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from cluster.site import Site

# Short and long names of those options of sbatch that are reckoned with.
KNOWN = {"A": "account", "q": "qos", "p": "partition", "C": "constraint"}
KNOWN |= {"w": "nodelist", "x": "exclude"}
LONG = {*KNOWN.values(), "reservation"}
# Those that change where a job fits, in ways that are not reckoned with here. `mem` and the like
# come from the job; a site that adds them asks for something else.
OTHERS = {"gres", "gpus", "gpus-per-node", "gpus-per-task", "mem", "mem-per-cpu", "mem-per-gpu"}
OTHERS |= {"nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "cpus-per-gpu", "time", "begin"}
OTHERS |= {"dependency", "licenses", "switches", "contiguous", "hold", "clusters", "mincpus", "tmp"}
OTHERS |= {"time-min", "deadline", "cores-per-socket", "sockets-per-node", "threads-per-core"}
OTHERS |= {"hint", "core-spec", "batch", "bb", "prefer", "nodefile", "exclusive-user", "array"}
SHORT_OTHERS = {"G": "gpus", "N": "nodes", "n": "ntasks", "c": "cpus-per-task", "t": "time"}
SHORT_OTHERS |= {"d": "dependency", "L": "licenses", "H": "hold", "M": "clusters", "b": "begin"}
SHORT_OTHERS |= {"F": "nodefile", "S": "core-spec", "B": "cores-per-socket", "a": "array"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is chosen for a job; empty where it is left to Slurm."""

    where: str
    """Whose choice it is, for messages: site.toml."""
    partition: str
    account: str
    qos: str
    gpu_type: str = ""
    reservation: str = ""
    constraint: str = ""
    nodelist: str = ""
    exclude: str = ""
    is_exclusive: bool = False
    not_reckoned_with: list[str] = field(default_factory=list)


def of(site: Site) -> Choice:
    """Return what the site and the environment choose; of what is said twice the last counts."""
    chosen = {"partition": site.slurm.partition}
    # Of sbatch's own variables a job sees these (cluster/plan.py).
    chosen["account"] = site.slurm.account or os.environ.get("SBATCH_ACCOUNT", "")
    chosen["reservation"] = os.environ.get("SBATCH_RESERVATION", "")
    chosen["qos"] = site.slurm.qos
    others: list[str] = []
    exclusive = False
    for name, value in _options(site.slurm.sbatch_flags):
        if name in LONG:
            chosen[name] = value
        elif name == "exclusive":
            exclusive = True
            others += [f"--exclusive={value}"] if value else []
        elif name in OTHERS:
            others.append(f"--{name}")
    return Choice(
        where=str(site.source or "the private cluster"),
        gpu_type=site.slurm.gpu_type,
        is_exclusive=exclusive,
        not_reckoned_with=others,
        **chosen,
    )


def features(constraint: str) -> list[str] | None:
    """Return the features that a node must all have; None: it is said in another way."""
    if not constraint:
        return []
    if re.fullmatch(r"[\w.:-]+([&,][\w.:-]+)*", constraint):
        return re.split("[&,]", constraint)
    return None


def _options(flags: list[str]) -> Iterator[tuple[str, str]]:
    waiting = ""
    for flag in flags:
        if waiting:
            yield waiting, flag
            waiting = ""
        elif flag.startswith("--"):
            name, equals, value = flag[2:].partition("=")
            if name in LONG and not equals:
                waiting = name
            else:
                yield name, value
        elif flag.startswith("-") and len(flag) > 1:
            letter, value = flag[1], flag[2:].removeprefix("=")
            if letter in KNOWN and not value:
                waiting = KNOWN[letter]
            elif known := KNOWN.get(letter) or SHORT_OTHERS.get(letter):
                yield known, value
