"""The overview of `make check` as tables in a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cluster.slurm import hosts
from cluster.slurm.reasons import clock

COLOURS = {"UP": "green", "idle": "green", "mixed": "green", "planned": "green"}
COLOURS |= {"DOWN": "red", "down": "red", "drained": "red", "RUNNING": "green"}
UNKNOWN = "unknown"
GIB = 1024**3


def show(facts: dict[str, Any]) -> None:
    """Print it all."""
    show_sections(_sections(facts))


def show_sections(sections: Iterable[tuple[str, Any]]) -> None:
    """Print titles and tables, as wide as the terminal, or in a file as wide as needed."""
    width = None
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        width = 10_000
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as capture:
        for title, content in sections:
            console.print(Text(title, style="bold"))
            console.print(content)
            console.print()
    for line in capture.get().rstrip("\n").splitlines():
        print(line.rstrip())


def _sections(facts: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    name = facts["cluster"] or "this cluster"
    version = facts["slurm_version"] or UNKNOWN
    yield f"{name}: Slurm {version}, partitions", _partitions(facts["partitions"])
    yield "nodes", _nodes(facts["nodes"])
    if facts["reservations"] is None or facts["reservations"]:
        yield "reservations", _reservations(facts["reservations"])
    yield f"accounts of {facts['user']}", _accounts(facts)
    yield "limits and their use", _limits(facts)
    yield "fair share", _fair_share(facts["fair_share"])
    yield "my jobs", _jobs(facts["jobs"])
    yield "this machine", _login_node(facts["login_node"])
    if facts["unknown"]:
        rows = [(what.replace("_", " "), why) for what, why in facts["unknown"].items()]
        yield "unknown", rows_of(["what", "why"], rows)


def rows_of(columns: list[str], rows: Iterable[Iterable[Any]]) -> Any:
    listed = [[UNKNOWN if cell is None else str(cell) for cell in row] for row in rows]
    if not listed:
        return Text("  none")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns, 1):
        # A terminal of 80 columns has room for the short columns; lists at the end are folded.
        short = number < len(columns) - 1
        head = column.replace(" ", "\n") if short else column
        table.add_column(head, overflow="fold", no_wrap=short, vertical="top")
    for row in listed:
        table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
    return table


def _partitions(partitions: list[dict[str, Any]]) -> Any:
    columns = ["name", "state", "time", "nodes", "per job", "whole free", "free CPUs", "free GPUs"]
    columns += ["accounts", "QOS"]
    rows = []
    for one in partitions:
        mark = "*" if one["is_default"] else ""
        least = one["min_nodes"] or 1
        most = UNKNOWN if one["max_nodes"] is None else one["max_nodes"]
        accounts = _allowed(one["allowed_accounts"], one["denied_accounts"])
        qos = _allowed(one["allowed_qos"], one["denied_qos"])
        rows.append(
            [
                one["name"] + mark,
                one["state"],
                one["max_time"].lower() if one["max_time"].isalpha() else one["max_time"],
                one["total_nodes"],
                f"{least}-{most}",
                one["whole_free_nodes"],
                _of(one["free_cpus"], one["total_cpus"]),
                _gpus(one["gpus"]),
                accounts,
                qos + (f" (limits of {one['qos']})" if one["qos"] else ""),
            ]
        )
    return rows_of(columns, rows)


def _allowed(allowed: list[str] | None, denied: list[str]) -> str:
    if allowed is not None:
        return ", ".join(allowed)
    return f"all but {', '.join(denied)}" if denied else "all"


def _of(some: int | None, total: int | None) -> str:
    return f"{UNKNOWN if some is None else some} of {UNKNOWN if total is None else total}"


def _gpus(gpus: list[dict[str, Any]] | None) -> str:
    if gpus is None:
        return UNKNOWN
    words = [
        f"{_of(one['free'], one['total'])}{' ' + one['type'] if one['type'] else ''}"
        for one in gpus
    ]
    return ", ".join(words) or "none"


def _nodes(nodes: list[dict[str, Any]] | None) -> Any:
    """One row for all nodes that are alike."""
    if nodes is None:
        return Text(f"  {UNKNOWN}")
    alike: dict[tuple[str, ...], list[str]] = {}
    for one in nodes:
        memory = f"{one['free_memory_mb'] // 1024} of {one['memory_mb'] // 1024} GB"
        cpus = _of(one["free_cpus"], one["cpus"])
        key = (one["state"], cpus, _gpus(one["gpus"]), memory, one["reason"] or "")
        alike.setdefault(key, []).append(one["name"])
    columns = ["state", "number", "free CPUs", "free GPUs", "free memory", "nodes", "why"]
    rows = [
        (state, len(names), cpus, gpus, memory, hosts.compact(names), reason)
        for (state, cpus, gpus, memory, reason), names in alike.items()
    ]
    return rows_of(columns, rows)


def _reservations(kept: list[dict[str, Any]] | None) -> Any:
    if kept is None:
        return Text(f"  {UNKNOWN}")
    rows = [
        (
            one["name"],
            clock(one["start"] or "") or None,
            clock(one["end"] or "") or None,
            one["nodes"],
            ", ".join(one["users"] + one["accounts"] + one["groups"]) or "none named",
            ", ".join(one["flags"]),
        )
        for one in kept
    ]
    return rows_of(["name", "from", "until", "nodes", "for", "flags"], rows)


def _accounts(facts: dict[str, Any]) -> Any:
    if facts["associations"] is None:
        return Text(f"  {UNKNOWN}")
    rows = [
        (
            one["account"] + ("*" if one["account"] == facts["default_account"] else ""),
            one["partition"] or "all",
            None if one["qos"] is None else ", ".join(one["qos"]),
            one["default_qos"] or "none",
        )
        for one in facts["associations"]
    ]
    return rows_of(["account", "partition", "QOS", "default QOS"], rows)


def _limits(facts: dict[str, Any]) -> Any:
    known = facts["associations"] is not None or facts["qos"] is not None
    rows = []
    for one in facts["qos"] or []:
        if one["is_mine"] is not False:
            rows += [_limit(limit) for limit in one["limits"]]
    for one in facts["associations"] or []:
        rows += [_limit(limit) for limit in [*one["limits"], *(one["limits_above"] or [])]]
    if not known:
        return Text(f"  {UNKNOWN}")
    if not rows and facts["unknown"]:
        return Text("  none shown")
    return rows_of(["whose", "limit", "of", "at most", "in use"], dict.fromkeys(rows))


def _limit(limit: dict[str, Any]) -> tuple[str, ...]:
    per_job = limit["name"].endswith(("PJ", "PN"))
    used = "" if per_job else UNKNOWN if limit["used"] is None else str(limit["used"])
    return limit["whose"], limit["name"], limit["of"] or "", limit["text"], used


def _fair_share(rows: list[dict[str, Any]] | None) -> Any:
    if rows is None:
        return Text(f"  {UNKNOWN}")
    cells = [
        (
            row["account"],
            row["fair_share"],
            row["shares"],
            row["usage"],
            "no" if row["weight"] == 0 else UNKNOWN if row["weight"] is None else "yes",
        )
        for row in rows
    ]
    return rows_of(["account", "fair share", "my share", "my usage", "counts for priority"], cells)


def _jobs(jobs: list[dict[str, Any]] | None) -> Any:
    if jobs is None:
        return Text(f"  {UNKNOWN}")
    rows = [
        (
            one["id"],
            one["name"],
            one["state"],
            one["partition"],
            one["num_nodes"],
            one["time_left"] or "",
            one["why"] or "",
        )
        for one in jobs
    ]
    return rows_of(["job", "name", "state", "partition", "nodes", "left", "why it waits"], rows)


def _login_node(here: dict[str, Any]) -> Any:
    space = [
        (
            one["folder"],
            f"{one['free_bytes'] / GIB:.0f} of {one['bytes'] / GIB:.0f} GiB free",
            one["path"],
        )
        for one in here["space"]
    ]
    for one in here["quotas"] or []:
        most = one["hard_limit_bytes"] or one["soft_limit_bytes"]
        limit = f"of {most / GIB:.0f} GiB used" if most else "GiB used, no space limit"
        space.append(("quota", f"{one['used_bytes'] / GIB:.1f} {limit}", one["file_system"]))
    if here["quotas"] is None:
        space.append(("quota", UNKNOWN, ""))
    modules = here["modules"]
    space.append(("modules", UNKNOWN if modules is None else ", ".join(modules) or "none", ""))
    found = here["apptainer"]
    version = (found["version"] or UNKNOWN) if found else "none found"
    space.append(("apptainer", version, found["path"] if found else ""))
    allowed = here["user_namespaces"]
    words = UNKNOWN if allowed is None else "allowed" if allowed else "not allowed"
    space.append(("user namespaces", words, ""))
    return Group(rows_of(["", "", ""], space))
