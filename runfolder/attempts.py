"""The attempts of a run: where and when each of them ran, and how it ended.

Jobs write here while others read, and may be killed while they write: a damaged file counts as
unknown and is never an error.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runfolder import checkpoints, heartbeats, records
from runfolder.exit_codes import EXIT_SAVED
from runfolder.files import read_json, text, write_json
from runfolder.lock import is_held

OUTCOMES = ("finished", "stopped", "failed", "unhealthy", "cancelled", "lost")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A folder of attempts/."""

    number: int
    folder: Path
    slurm: dict[str, Any] | None
    """slurm.json; {} if damaged, None if missing, as in an attempt of `make run`."""
    outcome: dict[str, Any] | None
    """outcome.json; {} if damaged, None until it is written."""

    def is_of(self, job_id: int) -> bool:
        """Whether this job made the attempt."""
        return self.slurm is not None and self.slurm.get("job_id", job_id) == job_id

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes, the first being node 0."""
        listed = (self.slurm or {}).get("nodes")
        return [text(name) for name in listed] if isinstance(listed, list) else []


def folder_of(run: Path, number: int) -> Path:
    """Return the folder of an attempt."""
    return run / "attempts" / str(number)


def preflight_folder(run: Path, number: int) -> Path:
    """Return the folder in which an attempt's nodes put their preflight results."""
    return folder_of(run, number) / "preflight"


def numbers(run: Path) -> list[int]:
    """Return the numbers of all attempts, newest last."""
    try:
        names = [path.name for path in (run / "attempts").iterdir()]
    except OSError:
        return []
    return sorted(int(name) for name in names if re.fullmatch(r"[0-9]{1,9}", name))


def read(run: Path, number: int) -> Attempt:
    """Return what is known about an attempt."""
    folder = folder_of(run, number)
    slurm, outcome = (read_json(folder / name) for name in ("slurm.json", "outcome.json"))
    return Attempt(number=number, folder=folder, slurm=slurm, outcome=outcome)


def read_all(run: Path) -> list[Attempt]:
    """Return all attempts, newest last."""
    return [read(run, number) for number in numbers(run)]


def close_last(run: Path, *, by_job: bool) -> None:
    """Record the newest attempt as lost, if it is over and could not record an outcome itself.

    `by_job`: a job is continuing the run, so no other job works on it any more.
    """
    for last in (read(run, number) for number in numbers(run)[-1:]):
        if last.outcome is not None:
            return
        # Slurm kills jobs without warning after a node failure, or a preemption without grace time.
        is_over = by_job if last.slurm is not None else not is_held(run)
        if is_over:
            reason = "it was killed" if last.slurm is None else "Slurm ended it"
            write_outcome(run, number=last.number, outcome="lost", reason=reason)


def begin(run: Path, slurm: dict[str, Any] | None = None) -> int:
    """Make the folder of the next attempt and return its number, starting with 1.

    `slurm`: for a Slurm job, where it runs; saved in slurm.json.
    """
    close_last(run, by_job=slurm is not None)
    number = 1 + max(numbers(run), default=0)
    folder = folder_of(run, number)
    folder.mkdir(parents=True)
    if slurm is not None:
        where = {"started": records.now(), **_reached(run)}
        write_json(folder / "slurm.json", slurm | where)
    return number


def current() -> int:
    """Return the number of the attempt that this process is part of; 1 when started by hand."""
    return int(os.environ.get("SLUICE_ATTEMPT", "1"))


def write_outcome(
    run: Path, *, outcome: str, number: int | None = None, **more: Any
) -> dict[str, Any]:
    """Write how an attempt ended, one of `OUTCOMES`, and return it; without `number`, this one.

    Without `step`, it ended at the newest checkpoint; a script that is not ours where its
    processes had counted to.
    """
    assert outcome in OUTCOMES, outcome
    folder = folder_of(run, current() if number is None else number)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"outcome": outcome, **_reached(run, folder), **more}
    write_json(folder / "outcome.json", content)
    return content


def _reached(run: Path, attempt: Path | None = None) -> dict[str, Any]:
    """Return how far a run is: its newest step; of a script that is not ours, what we can see."""
    program = records.program(run)
    if program is None:
        return {"step": checkpoints.newest_step(run) or 0}
    beat = heartbeats.read(attempt) if attempt is not None else {}
    saved = checkpoints.newest_write(run, program["checkpoints"])
    return {"step": beat.get("steps", 0), "counts_steps": bool(beat), "saved": saved}


def has_progressed(began: dict[str, Any], outcome: dict[str, Any]) -> bool:
    """Return whether an attempt came further than where it began: slurm.json, outcome.json.

    Of a script that is not ours both have to be seen, steps and a checkpoint: without the one it
    only wrote files, without the other it would begin anew each time. One that takes no steps of
    torch's optimizers is known by its checkpoints.
    """
    if "saved" in outcome:
        stepped = bool(outcome.get("step")) or not outcome.get("counts_steps")
        return stepped and bool(outcome["saved"] > began.get("saved", 0))
    return bool(outcome.get("step", 0) > began.get("step", 0))


def write_outcome_of_program(run: Path, code: int, asked: str) -> None:
    """Write how a script that is not ours ended, which does not do so itself: done, or saved.

    `asked`: the signal that it was sent. What failed is known to the caller alone.
    """
    if records.program(run) is None:
        return
    if code == 0:
        write_outcome(run, outcome="finished")
    elif code == EXIT_SAVED:
        write_outcome(run, outcome="stopped", reason=asked or f"exit code {code}")


def annotate(run: Path, number: int, **more: Any) -> dict[str, Any]:
    """Add to an attempt's outcome.json; return its whole content."""
    found = read(run, number)
    content = (found.outcome or {}) | more
    write_json(found.folder / "outcome.json", content)
    return content
