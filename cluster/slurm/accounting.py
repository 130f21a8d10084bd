"""My associations and QOS: what they limit, and how much of that is in use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from cluster.slurm import assoc_mgr, notation
from cluster.slurm.assoc_mgr import Live
from cluster.slurm.associations import (
    ENFORCING,
    OF_ASSOCIATION,
    OF_QOS,
    Accounting,
    Association,
    Bound,
    Key,
    Qos,
)
from cluster.slurm.call import Slurm
from cluster.slurm.nodes import tres
from cluster.slurm.refusals import SlurmError
from runfolder.errors import printable


def read(queue: Slurm, config: Mapping[str, str], user: str) -> Accounting:
    """Ask what applies to `user`: the database for the limits, the controller for their use.

    What one of them does not show is taken from the other if it has it, and is otherwise unknown.

    Raises:
        ControllerUnreachable: nothing answers.
    """
    enforced = frozenset(config.get("AccountingStorageEnforce", "").lower().split(","))
    if not enforced & ENFORCING:
        # Accounts are only for the record: nobody needs one, and their limits are not enforced.
        return Accounting(user=user, enforced=enforced)
    unknown: list[str] = []
    layout = ["user", "defaultaccount", "account", "partition", "qos", "defaultqos"]
    where = [f"name={user}", "withassoc", f"cluster={config.get('ClusterName', '')}"]
    of_qos = ["name", "priority", "flags", "preempt", *OF_QOS]
    # The database is slow to open a connection, so ask both at once.
    with ThreadPoolExecutor(2) as pool:
        users = pool.submit(_rows, queue, "user", where, [*layout, *OF_ASSOCIATION], unknown)
        all_qos = pool.submit(_rows, queue, "qos", [], of_qos, unknown)
        live = assoc_mgr.read(queue, user, unknown)
        rows, shown = users.result(), all_qos.result()
    mine = [row for row in rows if row["account"]]
    associations = [_association(row, live, user, unknown) for row in mine]
    qos = {row["name"]: _qos(row, live, user, associations, unknown) for row in shown}
    if not associations and live:
        # The database hides what the controller shows.
        associations = [
            assoc_mgr.association_alone(record, live, unknown)
            for record in live.associations
            if record["UserName"].partition("(")[0] == user
        ]
        if associations:
            unknown.append("which QOS you may use: sacctmgr shows no association for you")
    if not qos and live:
        qos = {name: assoc_mgr.qos_alone(name, live, user, unknown) for name in live.qos}
        if qos:
            unknown.append("limits of a QOS for each user and account: sacctmgr shows no QOS")
    is_hidden = not associations and not (live and live.associations and qos)
    if is_hidden:
        unknown.append(f"accounts of {user}, and all limits that come with them: none are shown")
    default = mine[0]["defaultaccount"] if mine else ""
    return Accounting(
        user=user,
        enforced=enforced,
        associations=tuple(associations),
        default_account=default or assoc_mgr.default_account(live, user),
        qos=qos,
        is_hidden=is_hidden,
        unknown=tuple(dict.fromkeys(unknown)),
    )


def _rows(
    queue: Slurm, what: str, where: list[str], layout: list[str], unknown: list[str]
) -> list[dict[str, str]]:
    # With a bar at the end too, so that a truncated line is recognized.
    words = ["--noheader", "--parsable", "show", what, *where, f"format={','.join(layout)}"]
    try:
        shown = queue.call("sacctmgr", *words)
    except SlurmError as error:
        # The database may be down while the controller works with what it has cached.
        unknown.append(f"{what}: sacctmgr says: {printable(str(error))}")
        return []
    rows = [line.split("|") for line in shown.splitlines() if line.strip()]
    whole = [row[:-1] for row in rows if len(row) == len(layout) + 1 and not row[-1]]
    if len(whole) < len(rows):
        unknown.append(f"{what}: a line of sacctmgr's output cannot be parsed")
    return [dict(zip(layout, row, strict=True)) for row in whole]


def _bounds(
    whose: str, row: Mapping[str, str], names: Mapping[str, str], unknown: list[str]
) -> dict[Key, Bound]:
    bounds = {}
    for column, name in names.items():
        values = list(_values(name, row[column]))
        # What is written there is a limit, even if we cannot parse it.
        if len(values) != len([word for word in row[column].split(",") if word]):
            unknown.append(f"{name} of {whose}: sacctmgr says: {printable(row[column])}")
        for kind, limit, text in values:
            bounds[name, kind] = Bound(
                whose=whose, name=name, tres=kind, limit=limit, text=text, used=None
            )
    return bounds


def _values(name: str, text: str) -> Iterator[tuple[str, int, str]]:
    """Return the resource, the limit, and how Slurm writes it; nothing for an unset limit."""
    if "TRES" in name:
        words = {word.partition("=")[0]: word.partition("=")[2] for word in text.split(",")}
        for kind, limit in tres(text).items():
            yield kind, limit, words.get(kind, str(limit))
    elif "Wall" in name:
        try:
            wall = notation.seconds(text) if text else None
        except ValueError:
            wall = None
        if wall is not None:
            yield "", wall // 60, text
    elif text.isdecimal() and len(text) < 16:
        yield "", int(text), text


def _association(
    row: Mapping[str, str], live: Live | None, user: str, unknown: list[str]
) -> Association:
    account = row["account"]
    bounds = _bounds(f"account {account}", row, OF_ASSOCIATION, unknown)
    record = assoc_mgr.record_of(live, account, row["partition"], user) if live else None
    return Association(
        account=account,
        partition=row["partition"],
        qos=tuple(name for name in row["qos"].split(",") if name),
        default_qos=row["defaultqos"],
        holder=assoc_mgr.with_use(f"account {account}", bounds, record),
        above=assoc_mgr.above(live, account, unknown) if live else None,
    )


def _qos(
    row: Mapping[str, str],
    live: Live | None,
    user: str,
    mine: list[Association],
    unknown: list[str],
) -> Qos:
    name = row["name"]
    whose = f"QOS {name}"
    record = assoc_mgr.qos_record(live, name, user, mine) if live and name in live.qos else None
    return Qos(
        name=name,
        priority=int(row["priority"]) if row["priority"].isdecimal() else None,
        flags=tuple(flag for flag in row["flags"].split(",") if flag),
        preempts=tuple(other for other in row["preempt"].split(",") if other),
        holder=assoc_mgr.with_use(whose, _bounds(whose, row, OF_QOS, unknown), record),
    )
