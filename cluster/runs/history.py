"""How the jobs of a run ended: what its folder shows, together with what Slurm still knows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.runs import folders
from cluster.slurm.call import QueuedJob
from cluster.slurm.reasons import OVER
from runfolder import attempts, checkpoints, records
from runfolder.attempts import OUTCOMES, Attempt
from runfolder.errors import UserError
from runfolder.files import last_lines, number, read_json, text
from runfolder.records import Submission

# How Slurm shows that the batch script did not even start: in the queue, and in the accounting,
# which keeps no reason but an exit code.
CANNOT_LAUNCH = {"JobLaunchFailure", "0:53"}


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job that is over ended."""

    word: str
    """One of `OUTCOMES`; "?" when its record is damaged."""
    step: int | None
    why: str
    outcome: dict[str, Any] | None = None
    """What the last attempt recorded, if it did."""


def name_of(folder: Path) -> str:
    """Return a run's name as RUN= accepts it: JOB/STAMP, or its path outside the runs folder."""
    inside = folder.parent.parent == folders.runs_folder()
    return shlex.quote(text(str(folder.relative_to(folder.parent.parent) if inside else folder)))


def submitted_runs() -> list[Path]:
    """Return the folders of all runs that were submitted to Slurm, the oldest first."""
    found = [path.parent for path in folders.runs_folder().glob("*/*/jobs.jsonl")]
    return sorted((path for path in found if path.name[0] != "."), key=lambda path: path.name)


def has_finished(folder: Path) -> bool:
    """Return whether a run's newest attempt came to its end."""
    newest = attempts.read_all(folder)[-1:]
    return any((one.outcome or {}).get("outcome") == "finished" for one in newest)


def runs_of_sweep(name: str) -> list[Path]:
    """Return the folders of a sweep's runs, the oldest first.

    Raises:
        UserError: there is no such sweep.
    """
    found = []
    for folder in submitted_runs():
        sweep = (read_json(folder / "run.json") or {}).get("sweep")
        if isinstance(sweep, dict) and sweep.get("name") == name:
            found.append(folder)
    if not found:
        raise UserError(f"NAME={name}: no sweep has this name; make status lists the runs")
    return found


def job_of(folder: Path, job_id: int, queue: Mapping[int, QueuedJob]) -> QueuedJob | None:
    """Return the run's job, if it is in the queue: a new cluster starts job IDs from 1 again."""
    job = queue.get(job_id)
    # The same folder may have been named by another path, through a link.
    same = job is not None and Path(job.folder).resolve() == folder.resolve()
    return job if same else None


def is_final(last: Submission, made: list[Attempt]) -> bool:
    """Return whether the folder alone shows that the job is over, whatever Slurm says."""
    return _outcome_of(last, made).get("outcome") in ("finished", "cancelled")


def is_settled(last: Submission, made: list[Attempt]) -> bool:
    """Return whether the job is over unless Slurm says that it is not.

    A batch script that ended for good may still be requeued, as after a preemption.
    """
    return is_final(last, made) or _outcome_of(last, made).get("next") == "stop"


def ending(folder: Path, last: Submission, made: list[Attempt], job: QueuedJob | None) -> Ending:
    """Return how a job that is over ended; `job` is what Slurm still knows about it."""
    own = [attempt for attempt in made if attempt.is_of(last.job_id)]
    outcome = own[-1].outcome if own else None
    state = job.state if job is not None else ""
    if outcome:
        word = text(outcome.get("outcome"))
        why, step = reason_of(outcome), number(outcome.get("step"))
        if outcome.get("next") == "requeue" and word != "finished":
            if state == "CANCELLED":
                return Ending(word="cancelled", step=step, why="while it waited to continue")
            why = f"{why + '; ' if why else ''}it should be requeued, but is not in the queue"
        word = word if word in OUTCOMES else "?"
        return Ending(word=word, step=step, why=why, outcome=outcome)
    if outcome is not None:
        return Ending(word="?", step=None, why=f"{own[-1].folder / 'outcome.json'} is damaged")
    if state == "CANCELLED":
        # In the accounting, a time; for a job that never began, None or Unknown.
        began = own or (job is not None and job.exit_code and job.start[:1].isdecimal())
        began = began or slurm_log(folder, last.job_id).exists()
        why = "without saving" if began else "before it started"
        return Ending(word="cancelled", step=None, why=why)
    last_words = "" if own else _last_words(folder, last.job_id)
    if state and state != "COMPLETED":
        why = _why_failed(folder, last.job_id, job) if job is not None else ""
        return Ending(word="failed", step=None, why=why + last_words)
    why = "it ended without a message" if own or state else ""
    why += "" if state else f"{', and ' if why else ''}Slurm no longer knows it"
    if not (own or state or last_words):
        why += ", and it left no log: whether it ever started is unknown"
    return Ending(word="lost", step=None, why=why + last_words)


def slurm_log(folder: Path, job_id: int) -> Path:
    """Return the log of a job's batch script, until its first attempt has its own."""
    return folder / f"slurm-{job_id}.log"


def _why_failed(folder: Path, job_id: int, job: QueuedJob) -> str:
    log = slurm_log(folder, job_id)
    if CANNOT_LAUNCH & {job.reason, job.exit_code}:
        where = f" on {text(job.nodes)}" if job.nodes else ""
        why = f"Slurm could not launch it{where} (JobLaunchFailure)"
        return (
            why
            if log.exists()
            else (
                f"{why}: usually that node cannot open {text(str(log))}, because the folder does "
                "not exist there, or has another path"
            )
        )
    why = OVER.get(job.state, text(job.state))
    code = job.exit_code.partition(":")[0]
    return f"{why} (exit code {code})" if job.state == "FAILED" and code.strip("0") else why


def _last_words(folder: Path, job_id: int) -> str:
    """Return what the log of a job without an attempt ends with, as the end of a sentence."""
    log = slurm_log(folder, job_id)
    if not log.exists():
        return ""
    lines = [text(line.decode(errors="replace")) for line in last_lines(log)]
    lines = [line for line in lines if line.strip()]
    said = next((line for line in reversed(lines) if "error" in line.lower()), None)
    said = said or next(reversed(lines), "nothing")
    return f"; {log.name} ends with: {said[:300]}"


def command_of(outcome: dict[str, Any] | None, name: str) -> str:
    """Return the command that the script of a finished run suggests; `name` is the run's.

    Empty for a script that is not ours.
    """
    if "saved" in (outcome or {}):
        return ""
    said = text((outcome or {}).get("command")) or 'make generate RUN= PROMPT="The cluster"'
    return re.sub(r"\bRUN=(?= |$)", lambda _: f"RUN={name}", said)


def next_start(folder: Path) -> str:
    """Return from where a run continues, in words; a script that is not ours decides itself."""
    if records.program(folder) is not None:
        return "continues with what its script saved"
    saved = checkpoints.newest_step(folder)
    return "starts over" if saved is None else f"continues from step {saved}"


def reason_of(outcome: dict[str, Any]) -> str:
    """Return why an attempt ended as it did, and what the batch script decided."""
    if outcome.get("outcome") == "finished":
        return ""
    parts = (text(outcome.get(key)) for key in ("reason", "why"))
    return "; ".join(part for part in parts if part)


def _outcome_of(last: Submission, made: list[Attempt]) -> dict[str, Any]:
    own = [attempt for attempt in made if attempt.is_of(last.job_id)]
    return (own[-1].outcome if own else None) or {}
