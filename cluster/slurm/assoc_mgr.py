"""The limits that the controller applies, with current usage: `scontrol show assoc_mgr`.

It has what the accounting database has, except the flags of a QOS and who may use which QOS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster.slurm import notation
from cluster.slurm.associations import (
    GROUP,
    OF_ASSOCIATION,
    OF_QOS,
    Association,
    Bound,
    Holder,
    Key,
    Qos,
)
from cluster.slurm.call import Slurm
from cluster.slurm.refusals import ControllerUnreachable, SlurmError
from runfolder.errors import printable

# The resource (cpu=), the limit (N: none), and how much is in use.
VALUE = re.compile(r"(?:([\w/:.-]+)=)?(N|\d{1,18})(?:\((\d{1,18})(?:\.\d+)?\))?")

# After "Account Limits=" and "User Limits=".
SHARES = re.compile(r"No (Accounts|Users)|(\S+=\{[^{}]*\}[\s,]*)+")


@dataclass(frozen=True)
class Live:
    """What the controller has in memory: the limits that it applies, with current usage."""

    associations: list[dict[str, str]]
    qos: dict[str, str]


def read(queue: Slurm, user: str, unknown: list[str]) -> Live | None:
    """Ask the controller; None, and a note in `unknown`, if it does not show them.

    Raises:
        ControllerUnreachable: it does not answer.
    """
    try:
        words = ("--oneliner", "show", "assoc_mgr", f"users={user}", "flags=assoc,qos")
        shown = queue.call("scontrol", *words)
    except ControllerUnreachable:
        raise
    except SlurmError as error:
        unknown.append(f"use of the limits: scontrol show assoc_mgr: {printable(str(error))}")
        return None
    live = parse(shown)
    if not live.associations and not live.qos:
        unknown.append("use of the limits: scontrol show assoc_mgr shows nothing")
        return None
    return live


def parse(shown: str) -> Live:
    """Return what `scontrol show assoc_mgr` shows."""
    live = Live([], {})
    for line in shown.splitlines():
        if line.startswith("ClusterName="):
            shows = notation.fields_of(line)
            if {"Account", "UserName", "ParentAccount"} <= set(shows):
                live.associations.append(shows)
        elif found := re.match(r"QOS=(.+?)\(\d+\) ", line):
            live.qos[found[1]] = line
    return live


def record_of(live: Live, account: str, partition: str, user: str) -> dict[str, str] | None:
    """Return the record of an association."""
    for record in live.associations:
        name = record["UserName"].partition("(")[0]
        if (record["Account"], name, record.get("Partition", "")) == (account, user, partition):
            return record
    return None


def above(live: Live, account: str, unknown: list[str]) -> tuple[Holder, ...] | None:
    """Return the account itself and those above it, up to the root of the tree."""
    accounts = {r["Account"]: r for r in live.associations if not r["UserName"]}
    chain: list[Holder] = []
    while account and len(chain) < 100:
        if account not in accounts:
            return None
        whose = f"account {account} (all users)"
        # Only its group limits apply to those below; the others have been inherited already.
        chain.append(
            Holder(whose=whose, bounds=_live_bounds(whose, accounts[account], GROUP, unknown))
        )
        account = accounts[account]["ParentAccount"].partition("(")[0]
    return tuple(chain)


def _live_bounds(
    whose: str, record: Mapping[str, str], names: Mapping[str, str], unknown: list[str]
) -> dict[Key, Bound]:
    """Return the limits that are set in one of the controller's records."""
    for name in names.values():
        if name not in record or not all(VALUE.fullmatch(w) for w in record[name].split(",") if w):
            unknown.append(f"{name} of {whose}: scontrol says: {printable(record.get(name, ''))}")
    bounds = {}
    for (name, kind), (limit, used) in _live_values(record).items():
        if limit is not None and name in names.values():
            bounds[name, kind] = Bound(
                whose=whose, name=name, tres=kind, limit=limit, text=_text(name, limit), used=used
            )
    return bounds


def _live_values(record: Mapping[str, str]) -> dict[Key, tuple[int | None, int | None]]:
    """Return the limits and usage in a record: GrpJobs=5(1), GrpTRES=cpu=N(2), MaxWallPJ=600."""
    values: dict[Key, tuple[int | None, int | None]] = {}
    for name in {*OF_ASSOCIATION.values(), *OF_QOS.values()}:
        for word in record.get(name, "").split(","):
            if found := VALUE.fullmatch(word.strip()):
                limit = None if found[2] == "N" else int(found[2])
                values[name, found[1] or ""] = limit, int(found[3]) if found[3] else None
    return values


def _text(name: str, limit: int) -> str:
    if "Wall" not in name:
        return str(limit)
    days, minutes = divmod(limit, 1440)
    clock = f"{minutes // 60:02}:{minutes % 60:02}:00"
    return f"{days}-{clock}" if days else clock


def with_use(whose: str, bounds: Mapping[Key, Bound], record: Mapping[str, str] | None) -> Holder:
    """Return the database's limits with the usage that the controller shows."""
    if record is None:
        return Holder(whose=whose, bounds=bounds)
    values = _live_values(record)
    used = {
        key: replace(bound, used=values.get(key, (0, None))[1]) for key, bound in bounds.items()
    }
    return Holder(whose=whose, bounds=used)


def qos_record(live: Live, name: str, user: str, mine: list[Association] | None) -> dict[str, str]:
    """Return a QOS's record with the usage of this user and of these accounts.

    Whoever has not used the QOS yet is not in it: their usage is 0.
    """
    own, _, rest = live.qos[name].partition(" Account Limits=")
    accounts, _, users = rest.partition(" User Limits=")
    zero = ",".join(f"{kind}=N(0)" for kind in _kinds(own))
    record = notation.fields_of(own)
    ours = {association.account for association in mine or []}
    for who, text, wanted in (("PA", accounts, ours), ("PU", users, _names(live, user))):
        if not SHARES.fullmatch(text.strip()):
            # Truncated, or from another release: then it is unknown.
            continue
        record |= {f"MaxJobs{who}": "N(0)", f"MaxSubmitJobs{who}": "N(0)", f"MaxTRES{who}": zero}
        for whom, content in re.findall(r"(\S+)=\{([^{}]*)\}", text):
            if whom in wanted or whom.partition("(")[0] in wanted:
                # Of several accounts of mine the most used one: better too much than too little.
                record |= _fuller(record, notation.fields_of(content))
    return record


def _fuller(record: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    before, now = _live_values(record), _live_values(other)
    sums = {name: sum(u or 0 for (n, _), (_, u) in before.items() if n == name) for name in other}
    mine = {name: sum(u or 0 for (n, _), (_, u) in now.items() if n == name) for name in other}
    return {name: text for name, text in other.items() if mine[name] >= sums[name]}


def _kinds(line: str) -> list[str]:
    text = notation.fields_of(line).get("GrpTRES", "")
    return [word.partition("=")[0] for word in text.split(",") if "=" in word]


def _names(live: Live, user: str) -> set[str]:
    """Return what the controller may call a user: ada, 1001."""
    known = {user}
    for record in live.associations:
        if found := re.fullmatch(r"(.+)\((\d+)\)", record["UserName"]):
            known |= {found[2]} if found[1] == user else set()
    return known


def association_alone(record: Mapping[str, str], live: Live, unknown: list[str]) -> Association:
    """Return an association about which the database says nothing."""
    whose = f"account {record['Account']}"
    return Association(
        account=record["Account"],
        partition=record.get("Partition", ""),
        qos=None,
        default_qos=record.get("DefQOS", "").partition("(")[0],
        holder=Holder(whose=whose, bounds=_live_bounds(whose, record, OF_ASSOCIATION, unknown)),
        above=above(live, record["Account"], unknown),
    )


def qos_alone(name: str, live: Live, user: str, unknown: list[str]) -> Qos:
    """Return a QOS about which the database says nothing; its flags are then unknown."""
    record = qos_record(live, name, user, None)
    whose = f"QOS {name}"
    return Qos(
        name=name,
        priority=None,
        flags=(),
        preempts=(),
        holder=Holder(whose=whose, bounds=_live_bounds(whose, record, OF_QOS, unknown)),
    )


def default_account(live: Live | None, user: str) -> str:
    """Return the default account; empty: unknown."""
    for record in live.associations if live else []:
        is_mine = record["UserName"].partition("(")[0] == user
        if is_mine and record.get("DefAssoc") == "Yes":
            return record["Account"]
    return ""
