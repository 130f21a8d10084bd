"""How far the ranks of an attempt are, by their optimizer steps: a small file for each.

    attempts/2/heartbeats/0.json    {"time": 1764500000.0, "steps": 120, "seconds_per_step": 0.8}

The steps are those of the attempt, counted from 0, whatever the script resumed from.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runfolder.files import read_json, write_json

# How long a rank waits for another's line, which explains why all of them end.
SAID_S = 10.0


def path_of(attempt: Path, rank: int) -> Path:
    """Return the file of a rank; `attempt` is the attempt's folder."""
    return attempt / "heartbeats" / f"{rank}.json"


def beat(
    attempt: Path,
    rank: int,
    steps: int,
    seconds_per_step: float | None,
    notes: Mapping[str, object] | None = None,
) -> None:
    """Write how many optimizer steps a rank has taken, and what the ranks compare.

    A disk that is full changes nothing: what trains is worth more than the record of how far it is.
    """
    path = path_of(attempt, rank)
    content = {"time": time.time(), "steps": steps, "seconds_per_step": seconds_per_step}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content | dict(notes or {}))
    except OSError:
        return


def notes(attempt: Path, world_size: int) -> list[dict[str, Any]]:
    """Return the files of all ranks; {} for one that has none."""
    return [read(attempt, rank) for rank in range(world_size)]


def read(attempt: Path, rank: int = 0) -> dict[str, Any]:
    """Return the file of a rank; {} without one."""
    return read_json(path_of(attempt, rank)) or {}


# ---- one line for all ranks ----


def is_first(marker: Path) -> bool:
    """Return whether this process is the first to take a marker, a file that it then makes."""
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def wait_until_said(marker: Path, *, said: bool) -> None:
    """Mark that the line is out, or wait for whoever prints it to do so."""
    if said:
        try:
            marker.write_text("said\n", encoding="utf-8")
        except OSError:
            return
        return
    until = time.monotonic() + SAID_S
    while time.monotonic() < until:
        try:
            if marker.read_text(encoding="utf-8"):
                return
        except OSError:
            return
        time.sleep(0.05)
