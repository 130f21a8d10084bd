"""Where a job would be queued, and which of a site's sbatch_flags affect its limits."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from cluster.site import flags
from cluster.site.settings import Site

# The options of sbatch that the check takes into account.
KNOWN = {"account", "constraint", "exclude", "nodelist", "partition", "qos", "reservation"}
# Those that change where a job fits, in ways that the check ignores. `mem` and the like come from
# the job; a site that adds them asks for something else.
OTHERS = {"gres", "mem", "mem-per-cpu", "mem-per-gpu", "begin", "oversubscribe", "tres-per-task"}
OTHERS |= {"dependency", "licenses", "switches", "contiguous", "hold", "mincpus", "tmp"}
OTHERS |= {"time-min", "deadline", "cores-per-socket", "sockets-per-node", "threads-per-core"}
OTHERS |= {"hint", "core-spec", "batch", "bb", "bbf", "prefer", "nodefile", "exclusive-user"}
OTHERS |= {"extra-node-info", "thread-spec", "cluster-constraint", "overcommit"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is chosen for a job; empty if left to Slurm."""

    where: str
    """Where the choice was made, for messages: site.toml."""
    partition: str
    account: str
    qos: str
    gpu_type: str = ""
    reservation: str = ""
    constraint: str = ""
    nodelist: str = ""
    exclude: str = ""
    is_exclusive: bool = False
    has_memory: bool = False
    """Whether a flag of the site sets the memory."""
    not_reckoned_with: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    """Variables that sbatch would read, but that are not passed to it."""

    @classmethod
    def from_site(cls, site: Site) -> Choice:
        """Return what the site and the environment choose; of repeated options the last counts."""
        chosen = {"partition": site.slurm.partition}
        # The variables of sbatch's own that reach it (cluster/commands/plan.py).
        chosen["account"] = site.slurm.account or os.environ.get("SBATCH_ACCOUNT", "")
        chosen["reservation"] = os.environ.get("SBATCH_RESERVATION", "")
        chosen["qos"] = site.slurm.qos
        others: list[str] = []
        exclusive = False
        for name, value in flags.options(site.slurm.sbatch_flags):
            if name in KNOWN:
                chosen[name] = value
            elif name == "exclusive":
                exclusive = True
                others += [f"--exclusive={value}"] if value else []
            elif name in OTHERS:
                others.append(f"--{name}")
        return cls(
            where=str(site.source or "the private cluster"),
            gpu_type=site.slurm.gpu_type,
            is_exclusive=exclusive,
            has_memory=any(other.startswith("--mem") for other in others),
            not_reckoned_with=others,
            ignored=flags.ignored(os.environ),
            **chosen,
        )


def features(constraint: str) -> list[str] | None:
    """Return the features that a node needs, all of them; None: the constraint has another form."""
    if not constraint:
        return []
    if re.fullmatch(r"[\w.:-]+([&,][\w.:-]+)*", constraint):
        return re.split("[&,]", constraint)
    return None
