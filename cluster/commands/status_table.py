"""The table of `make status`, with as many columns as fit the terminal."""

from __future__ import annotations

import os
import sys
from typing import Any

from cluster.slurm.reasons import WAITING, clock, duration
from runfolder import files

# Below this width the notes are under the table, and the table has fewer columns.
WIDE = 140
COLOURS = {"running": "green", "saving": "green", "finished": "bold", "stopped": "yellow"}
COLOURS |= {"failed": "red", "unhealthy": "red", "lost": "red", "?": "red", "held": "red"}


def show(shown: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = None
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        # Into a file or a pipe: a line for each run, however long.
        width = 10_000
    console = Console(width=width, highlight=False, markup=False)
    wide = console.width >= WIDE
    longest = max(len(row["run"]) for row in shown)
    # Names are for copying: the terminal may wrap a line, but no name is cut.
    console.width = max(console.width, longest + 44)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", no_wrap=True)
    table.add_column("job", no_wrap=True, justify="right")
    table.add_column("state", no_wrap=not wide)
    if wide:
        table.add_column("nodes", overflow="fold", max_width=24)
        table.add_column("attempts", justify="right")
        table.add_column("since", no_wrap=True)
    table.add_column("step", no_wrap=True, justify="right")
    if wide:
        table.add_column("tokens/s", no_wrap=True, justify="right")
    table.add_column("left", no_wrap=True, justify="right")
    if wide:
        table.add_column("note", overflow="fold")
    for row in shown:
        cells = _cells(row)
        names = ["run", "job", "state", "step", "left"]
        if wide:
            names[3:3] = ["nodes", "attempts", "since"]
            names[7:7] = ["tokens/s"]
            names += ["note"]
        table.add_row(
            *(
                Text(cells[name], style=COLOURS.get(row["state"], "") if name == "state" else "")
                for name in names
            )
        )
    with console.capture() as capture:
        console.print(table)
        for row in [] if wide else shown:
            if more := _more(row, _cells(row)):
                console.print(Text(f"job {row['job_id']}: {more}"))
    for line in capture.get().splitlines():
        print(line.rstrip())


def _cells(row: dict[str, Any]) -> dict[str, str]:
    def known(key: str) -> str:
        return "?" if row[key] is None else str(row[key])

    rate, left = row["tokens_per_second"], row["time_left_s"]
    started = row["slurm_state"] not in WAITING and row["start"]
    return {
        "run": row["run"],
        "job": str(row["job_id"]),
        "state": row["state"],
        "nodes": files.text(row["nodes"]) or known("num_nodes"),
        "attempts": str(row["attempts"]),
        "since": clock(row["start"]) if started else "",
        "step": f"{known('step')}/{known('max_steps')}",
        "tokens/s": f"{rate:,.0f}" if rate else "",
        "left": duration(left) if left is not None else "",
        "note": row["note"],
    }


def _more(row: dict[str, Any], cells: dict[str, str]) -> str:
    """Return what a narrow table has no room for."""
    parts = []
    if cells["since"]:
        parts.append(f"on {cells['nodes']} since {cells['since']}, attempt {row['attempts']}")
    if cells["since"] and cells["tokens/s"]:
        parts.append(f"{cells['tokens/s']} tokens/s")
    return "; ".join([*parts, row["note"]] if row["note"] else parts)
