"""run.json, which says what a run is, and jobs.jsonl, which lists its jobs."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from runfolder.files import append_json, json_object, number, read_json, text, write_json

NEEDED = ("job", "module", "accel", "num_processes")
# Below code/: the folder of a script that is not in the checkout.
SCRIPT_FOLDER = "script"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


def now() -> str:
    """Return the current time in the format of the records."""
    return time.strftime(TIME_FORMAT)


def write(run: Path, content: dict[str, Any]) -> None:
    """Write the run.json of a new run.

    Raises:
        OSError: it cannot be written.
    """
    write_json(run / "run.json", content | {"created": now()})


def read(run: Path) -> dict[str, Any]:
    """Return the run.json of a run.

    Raises:
        UserError: it is damaged.
    """
    path = run / "run.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in NEEDED:
            content[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not the record of a run: {error}") from None
    return content


def program(run: Path) -> dict[str, Any] | None:
    """Return what run.json says of a script that is not ours; None for ours."""
    found = (read_json(run / "run.json") or {}).get("program")
    return found if isinstance(found, dict) else None


# ---- its jobs ----


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A line of jobs.jsonl: one submission of the run."""

    job_id: int
    submitted: str
    """ISO time."""
    num_nodes: int | None
    cluster: str = ""
    """If several share one accounting database; empty in older records: the local cluster."""
    content: dict[str, Any] = field(default_factory=dict)
    """The whole line."""


def was_submitted(run: Path) -> bool:
    """Return whether the run was ever queued."""
    return (run / "jobs.jsonl").exists()


def submissions(run: Path) -> list[Submission]:
    """Return the submissions in jobs.jsonl, newest last, without damaged lines."""
    found = []
    for line in _lines(run):
        content = json_object(line)
        if job_id := number(content.get("job_id")):
            found.append(
                Submission(
                    job_id=job_id,
                    submitted=text(content.get("submitted")),
                    num_nodes=number(content.get("num_nodes")),
                    cluster=text(content.get("cluster")),
                    content=content,
                )
            )
    return found


def has_damaged_end(run: Path) -> bool:
    """Return whether the newest submission cannot be read."""
    return number(json_object((_lines(run) or [b""])[-1]).get("job_id")) is None


def _lines(run: Path) -> list[bytes]:
    try:
        lines = (run / "jobs.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()]


def add_submission(run: Path, job_id: int, content: dict[str, Any]) -> None:
    """Record that the run was queued, as `job_id`.

    Raises:
        OSError: it cannot be written.
    """
    append_json(run / "jobs.jsonl", {"job_id": job_id, "submitted": now(), **content})
