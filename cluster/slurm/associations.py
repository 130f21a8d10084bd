"""What limits belong to: a QOS, an association of user and account, its parent accounts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# What sacctmgr calls a limit, and what the controller calls it. Those of the first two lines are
# numbers, or for the wall a time; those of the last two are lists such as cpu=4,gres/gpu=2.
GROUP = {"grpjobs": "GrpJobs", "grpsubmit": "GrpSubmitJobs", "grpwall": "GrpWall"}
GROUP |= {"grptres": "GrpTRES", "grptresmins": "GrpTRESMins", "grptresrunmins": "GrpTRESRunMins"}
JOB = {"maxwall": "MaxWallPJ"}
JOB |= {"maxtres": "MaxTRESPJ", "maxtrespernode": "MaxTRESPN", "maxtresmins": "MaxTRESMinsPJ"}
OF_ASSOCIATION = {**GROUP, **JOB, "maxjobs": "MaxJobs", "maxsubmit": "MaxSubmitJobs"}
OF_QOS = {**GROUP, **JOB, "maxjobspu": "MaxJobsPU", "maxsubmitpu": "MaxSubmitJobsPU"}
OF_QOS |= {"maxjobspa": "MaxJobsPA", "maxsubmitpa": "MaxSubmitJobsPA"}
OF_QOS |= {"maxtrespu": "MaxTRESPU", "maxtrespa": "MaxTRESPA", "mintres": "MinTRESPJ"}
# What the controller enforces: that a job has an account, limits, QOS.
ENFORCING = {"associations", "limits", "qos", "safe", "all"}

Key = tuple[str, str]
"""A limit's name in the controller, and the resource: ("GrpTRES", "gres/gpu")."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One limit that is set."""

    whose: str
    name: str
    tres: str
    limit: int
    """A count; MB of memory; minutes of wall time."""
    text: str
    """As Slurm writes it."""
    used: int | None
    """None: unknown."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """What has limits: a QOS, an association, or a parent account."""

    whose: str
    bounds: Mapping[Key, Bound]


@dataclass(frozen=True, kw_only=True)
class Qos:
    """A QOS."""

    name: str
    priority: int | None
    flags: tuple[str, ...]
    preempts: tuple[str, ...]
    holder: Holder


@dataclass(frozen=True, kw_only=True)
class Association:
    """An account that I may use: in one partition, or in all if none is named."""

    account: str
    partition: str
    qos: tuple[str, ...] | None
    """Those that I may use; None: unknown."""
    default_qos: str
    holder: Holder
    above: tuple[Holder, ...] | None
    """The parent accounts, nearest first; None: unknown."""


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """All that is known about accounts, QOS and their limits."""

    user: str
    enforced: frozenset[str]
    associations: tuple[Association, ...] = ()
    default_account: str = ""
    qos: Mapping[str, Qos] = field(default_factory=dict)
    is_hidden: bool = False
    """Whether no association of mine is shown, which need not mean that I have none."""
    unknown: tuple[str, ...] = ()

    @property
    def binds(self) -> bool:
        """Whether jobs need an account at all."""
        return bool(self.enforced & ENFORCING)

    @property
    def limits_bind(self) -> bool:
        """Whether limits are enforced."""
        return bool(self.enforced & {"limits", "safe", "all"})

    @property
    def qos_binds(self) -> bool:
        """Whether I may use only the QOS that were granted to me."""
        return bool(self.enforced & {"qos", "all"})
