"""Reservations: nodes that are kept for users, or for maintenance, with start and end."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from cluster.slurm import hosts
from cluster.slurm.call import Slurm
from cluster.slurm.notation import fields_of


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """What scontrol says about a reservation."""

    name: str
    start: str
    """Local time in ISO format."""
    end: str
    nodes: tuple[str, ...]
    cpus: int
    """Of all its nodes together."""
    users: tuple[str, ...]
    accounts: tuple[str, ...]
    groups: tuple[str, ...]
    partition: str
    flags: tuple[str, ...]

    def admits(self, user: str, account: str) -> bool:
        """Return whether a job of this user and account may use it; groups are not checked."""
        if "-" in "".join(word[:1] for word in (*self.users, *self.accounts)):
            # Names with a leading - are denied.
            return f"-{user}" not in self.users and f"-{account}" not in self.accounts
        return (not self.users or user in self.users) and (
            not self.accounts or account in self.accounts
        )


def read(queue: Slurm) -> dict[str, Reservation]:
    """Ask Slurm for the reservations.

    Raises:
        SlurmError: it does not show them.
    """
    return parse(queue.call("scontrol", "--oneliner", "show", "reservation"))


def parse(shown: str) -> dict[str, Reservation]:
    """Return the reservations in scontrol's output."""
    found = {}
    for line in shown.splitlines():
        shows = fields_of(line)

        def words(key: str, shows: dict[str, str] = shows) -> tuple[str, ...]:
            value = shows.get(key, "")
            return () if value in ("", "(null)", "N/A") else tuple(value.split(","))

        if name := shows.get("ReservationName"):
            cores = shows.get("CoreCnt", "0")
            found[name] = Reservation(
                name=name,
                start=shows.get("StartTime", ""),
                end=shows.get("EndTime", ""),
                nodes=tuple(hosts.expand(shows.get("Nodes", ""))),
                cpus=int(cores) if re.fullmatch(r"\d{1,12}", cores) else 0,
                users=words("Users"),
                accounts=words("Accounts"),
                groups=words("Groups"),
                # The second since 26.05, where it may be several.
                partition=",".join(words("PartitionName") or words("AllowedPartitions")),
                flags=words("Flags"),
            )
    return found


def epoch(moment: str) -> float | None:
    """Return one of Slurm's local times in seconds since 1970; None: unknown."""
    try:
        return time.mktime(time.strptime(moment[:19], "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None
