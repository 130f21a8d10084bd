"""What the nodes of a cluster have, how much is free, and the actual state of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.slurm.call import Slurm
from cluster.slurm.notation import fields_of

# A state may have several words (IDLE+DRAIN, MIXED+PLANNED, DOWN*): the first row here that has one
# of them decides how the node can be used.
STATES = (
    ("down", {"DOWN", "FAIL", "FAILING", "ERROR", "NO_RESPOND", "NOT_RESPONDING", "INVALID_REG"}),
    ("drained", {"DRAIN", "DRAINED", "DRAINING", "EXTERNAL"}),
    ("maintenance", {"MAINT", "MAINTENANCE", "REBOOT", "REBOOT_ISSUED"}),
    ("reserved", {"RESERVED"}),
    ("powering down", {"POWERING_DOWN", "POWER_DOWN"}),
    ("powered down", {"POWERED_DOWN", "POWERING_UP", "POWER_UP"}),
    ("future", {"FUTURE", "FUTR"}),
    ("unknown", {"UNKNOWN"}),
    ("blocked", {"BLOCKED", "PERFCTRS", "NPC"}),
    ("completing", {"COMPLETING"}),
    ("allocated", {"ALLOCATED"}),
    ("mixed", {"MIXED"}),
    ("planned", {"PLANNED"}),
    ("idle", {"IDLE"}),
)
# Nodes that Slurm gives to new jobs; a planned one until another job's planned start, and one that
# is powered down after some minutes, because it is booted for the job.
IN_SERVICE = {"idle", "mixed", "planned", "completing", "allocated", "powered down"}
# After a state: does not respond, is rebooted, powers up or down, is planned for a job.
MARKS = {"*": "NO_RESPOND", "@": "REBOOT", "^": "REBOOT", "~": "POWERED_DOWN", "#": "POWERING_UP"}
MARKS |= {"!": "POWERING_DOWN", "%": "POWERING_DOWN", "$": "MAINT", "-": "PLANNED"}


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node; None is what Slurm does not show."""

    name: str
    state: str
    """One of the words of `STATES`."""
    slurm_state: str
    partitions: tuple[str, ...]
    cpus: int
    cpus_used: int
    cores: int
    """0: unknown. The CPUs are these, or all their threads, as the site has set it."""
    threads_per_core: int
    memory_mb: int
    memory_used_mb: int
    gpus: Mapping[str, int]
    """By type, "" where the site names none."""
    gpus_used: Mapping[str, int] | None
    features: tuple[str, ...]
    reason: str
    """Why it is drained or down."""

    @property
    def is_in_service(self) -> bool:
        """Whether jobs start on it: it is not down, drained or reserved."""
        return self.state in IN_SERVICE

    @property
    def is_whole_free(self) -> bool:
        """Whether none of it is in use, and jobs may start on it."""
        return self.state in ("idle", "planned", "powered down") and not self.cpus_used

    @property
    def cpus_free(self) -> int:
        """Those that a job could get now."""
        return max(0, self.cpus - self.cpus_used) if self.is_in_service else 0

    def gpus_free(self, kind: str | None = None) -> int | None:
        """Return how many a job could get now, of one type or of all; None: unknown."""
        if not self.is_in_service:
            return 0
        if self.gpus_used is None:
            return None
        kinds = self.gpus if kind is None else [kind]
        return sum(max(0, self.gpus.get(k, 0) - self.gpus_used.get(k, 0)) for k in kinds)


def read(queue: Slurm) -> dict[str, Node]:
    """Ask Slurm for its nodes.

    Raises:
        SlurmError: it does not show them.
    """
    # --detail also shows which GPUs are in use, if the site does not count them otherwise.
    return parse(queue.call("scontrol", "--oneliner", "--detail", "show", "node"))


def parse(shown: str) -> dict[str, Node]:
    """Return the nodes in scontrol's output; other lines are left out."""
    nodes = {}
    for line in shown.splitlines():
        shows = fields_of(line)
        name = shows.get("NodeName", "")
        # Without its state and size it could be anything.
        if name and "State" in shows and _number(shows.get("CPUTot")):
            nodes[name] = _node(name, shows)
    return nodes


def _node(name: str, shows: Mapping[str, str]) -> Node:
    configured, allocated = tres(shows.get("CfgTRES", "")), tres(shows.get("AllocTRES", ""))
    gpus = gres(shows.get("Gres", ""))
    used: dict[str, int] | None = None
    if shows.get("GresUsed"):
        used = gres(shows["GresUsed"])
    elif "gres/gpu" in configured:
        used = {"": allocated.get("gres/gpu", 0)}
    if not gpus and configured.get("gres/gpu"):
        gpus = {"": configured["gres/gpu"]}
    if used is not None and set(used) - set(gpus):
        # The used GPUs have no type, or another: that is only clear if there is one type.
        used = {next(iter(gpus)): sum(used.values())} if len(gpus) == 1 else None
    if not gpus:
        used = {}
    features = shows.get("ActiveFeatures", "(null)")
    return Node(
        name=name,
        state=state_of(shows["State"]),
        slurm_state=shows["State"],
        partitions=tuple(filter(None, shows.get("Partitions", "").split(","))),
        cpus=_number(shows.get("CPUEfctv")) or _number(shows.get("CPUTot")),
        cpus_used=_number(shows.get("CPUAlloc")),
        cores=_number(shows.get("Sockets")) * _number(shows.get("CoresPerSocket")),
        threads_per_core=_number(shows.get("ThreadsPerCore")) or 1,
        memory_mb=max(0, _number(shows.get("RealMemory")) - _number(shows.get("MemSpecLimit"))),
        memory_used_mb=_number(shows.get("AllocMem")),
        gpus=gpus,
        gpus_used=used,
        features=() if features == "(null)" else tuple(features.split(",")),
        reason=shows.get("Reason", "").strip(),
    )


def state_of(text: str) -> str:
    """Return the one word for a state of Slurm's, or "unknown"."""
    first = text.split(" ")[0]
    words = {re.sub(r"[^A-Z_]", "", word) for word in first.upper().split("+")}
    words |= {MARKS[letter] for letter in first if letter in MARKS}
    return next((word for word, those in STATES if words & those), "unknown")


def gres(text: str) -> dict[str, int]:
    """Return the GPUs of a list such as gpu:a100:4(S:0-1),gpu:2,shard:8 by type."""
    found: dict[str, int] = {}
    pattern = r"(?:^|,)gpu(?::(\(null\)|[^:,()]+))??:(\d{1,6})(?=[,(]|$)"
    for kind, count in re.findall(pattern, text):
        kind = "" if kind == "(null)" else kind
        found[kind] = found.get(kind, 0) + int(count)
    return found


def tres(text: str) -> dict[str, int]:
    """Return the counts of a list such as cpu=4,mem=8000M,gres/gpu=2; memory in MB."""
    units = {"": 1, "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2, "P": 1024**3}
    found = {}
    for word in text.split(","):
        key, _, value = word.strip().partition("=")
        if number := re.fullmatch(r"(\d{1,18})(?:\.\d+)?([KMGTP]?)", value):
            scale = units[number[2]] if key in ("mem", "bb/datawarp") else 1
            found[key] = int(int(number[1]) * scale)
    return found


def free_gpus(nodes: Iterable[Node]) -> dict[str, tuple[int | None, int]]:
    """Return how many GPUs are free and how many there are, by type; None: unknown."""
    free: dict[str, tuple[int | None, int]] = {}
    for node in nodes:
        for kind, count in node.gpus.items():
            some, all_of_them = free.get(kind, (0, 0))
            now = node.gpus_free(kind)
            known = None if some is None or now is None else some + now
            free[kind] = known, all_of_them + count
    return free


def _number(text: str | None) -> int:
    found = re.match(r"\d{1,15}", text or "")
    return int(found[0]) if found else 0
