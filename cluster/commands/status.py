"""`make status`: the submitted runs, what each is doing, and why it waits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from cluster.errors import Parser
from cluster.runs import clusters, folders, history
from cluster.runs.progress import Progress, read_progress
from cluster.site.file import load_site
from cluster.slurm import notation
from cluster.slurm.call import QueuedJob, Slurm
from cluster.slurm.reasons import ACTIVE, WAITING, clock, duration, waits
from cluster.slurm.refusals import SlurmError
from runfolder import attempts, checkpoints, decision, records
from runfolder.errors import UserError, printable

RECENT_S = 24 * 3600
VERSION = 1
NO_REQUEUE = ": will save and end, because Slurm will not requeue it (Requeue=0)"


def main(argv: list[str]) -> int:
    """Print the table; return 0."""
    parser = Parser(
        prog="python -m cluster status",
        description="The submitted runs: what each is doing, and why it waits.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", default="", help="only this run, however old")
    parser.add_argument("--name", default="", help="only the runs of this sweep, however old")
    parser.add_argument("--format", default="table", choices=["table", "json"])
    options = parser.parse_args(argv)
    if options.name:
        wanted = history.runs_of_sweep(options.name)
    elif options.run:
        wanted = [folders.find(options.run)]
        if not records.submissions(wanted[0]):
            raise UserError(
                f"RUN={options.run}: was never submitted to Slurm; make submit "
                f"RUN={history.name_of(wanted[0])} submits it"
            )
    else:
        wanted = history.submitted_runs()
    shown, older = facts(wanted, all_ages=bool(options.run or options.name))
    if options.format == "json":
        print(json.dumps({"version": VERSION, "runs": shown, "older": older}, indent=2))
        return 0
    if shown:
        # Its library takes a while to load.
        from cluster.commands import status_table

        status_table.show(shown)
    else:
        print(f"no job in the queue, and none ended in the last day, in {folders.runs_folder()}")
        print("next: make submit JOB=tinyllama")
    if older:
        word = "run" if older == 1 else "runs"
        print(f"{older} older {word} not shown; make status RUN=JOB/STAMP shows one")
    return 0


def facts(wanted: list[Path], *, all_ages: bool) -> tuple[list[dict[str, Any]], int]:
    """Return what is known about each run, and how many are left out because they ended long ago.

    Slurm is asked once, and not at all if the folders alone show that every job is over.

    Raises:
        UserError: it does not answer.
    """
    last = {folder: records.submissions(folder)[-1:] for folder in wanted}
    latest = {folder: found[0] for folder, found in last.items() if found}
    made = {folder: attempts.read_all(folder) for folder in latest}
    asked = {
        folder: latest[folder]
        for folder in latest
        if not history.is_final(latest[folder], made[folder])
    }
    settings = load_site() if asked else None
    jobs: dict[Path, QueuedJob] = {}
    silent: dict[str, SlurmError] = {}
    if settings:
        old = () if all_ages else {path for path in asked if not _is_recent(path, made[path])}
        jobs, silent = clusters.jobs_of(Slurm.from_site(settings), asked, old=old)
    shown, older = [], 0
    for folder, submission in latest.items():
        job = jobs.get(folder)
        if submission.cluster in silent and folder in asked:
            shown.append(_unknown(folder, submission, made[folder], silent[submission.cluster]))
        elif job is not None and job.state in ACTIVE:
            save_s = settings.slurm.save_s if settings else 0
            shown.append(_active(folder, submission, made[folder], job, save_s))
        elif all_ages or _is_recent(folder, made[folder]):
            shown.append(_over(folder, submission, made[folder], job))
        else:
            older += 1
    return shown, older


def _active(
    folder: Path,
    last: records.Submission,
    made: list[attempts.Attempt],
    job: QueuedJob,
    save_s: int,
) -> dict[str, Any]:
    """Return what is known about a run whose job is in the queue."""
    own = [attempt for attempt in made if attempt.is_of(last.job_id)]
    came = read_progress(folder, own[-1] if own else None)
    left = _seconds(job.time_left)
    state, note = ACTIVE[job.state], ""
    if job.state in WAITING:
        state = "queued again" if own and state == "waiting" else state
        note = waits(job.reason, job.start, job.job_id, job.cluster)
    elif state == "saving" and own and own[-1].outcome is not None:
        state = "ending"
    elif state == "running" and decision.is_cancel_requested(folder, job.job_id):
        state, note = "cancelling", "it is saving, and will then end"
    elif state == "running" and came.needed_s is not None and left is not None:
        note = f"needs {duration(came.needed_s)}, {duration(left)} left"
        if came.needed_s > left - save_s:
            requeues = not own or (own[-1].slurm or {}).get("requeues") is not False
            note += ": will be requeued automatically" if requeues else NO_REQUEUE
    return {
        **_common(folder, last, made, came),
        "state": state,
        "slurm_state": job.state,
        "reason": job.reason if job.state in WAITING else None,
        "note": note,
        "start": job.start if clock(job.start) else None,
        "nodes": job.nodes,
        "time_left_s": left if job.state == "RUNNING" else None,
        "needed_s": came.needed_s,
    }


def _over(
    folder: Path,
    last: records.Submission,
    made: list[attempts.Attempt],
    job: QueuedJob | None,
) -> dict[str, Any]:
    """Return what is known about a run whose job is over."""
    end = history.ending(folder, last, made, job)
    again = f"make submit RUN={history.name_of(folder)}"
    next_step = f"make logs RUN={history.name_of(folder)}"
    if end.word == "finished":
        next_step = history.command_of(end.outcome, history.name_of(folder))
    elif end.word in ("stopped", "cancelled", "lost"):
        next_step = again
    return {
        **_common(folder, last, made, read_progress(folder, made[-1] if made else None)),
        "state": end.word,
        "slurm_state": job.state if job is not None else None,
        "reason": None,
        "note": "; ".join(part for part in (end.why, next_step) if part),
        "start": None,
        "nodes": "",
        "time_left_s": None,
        "needed_s": None,
    }


def _unknown(
    folder: Path, last: records.Submission, made: list[attempts.Attempt], error: SlurmError
) -> dict[str, Any]:
    """Return what is known about a run whose cluster does not answer."""
    return {
        **_common(folder, last, made, read_progress(folder, made[-1] if made else None)),
        "state": "?",
        "slurm_state": None,
        "reason": None,
        "note": f"cluster {last.cluster or '(local)'}: {printable(str(error))}",
        "start": None,
        "nodes": "",
        "time_left_s": None,
        "needed_s": None,
    }


def _common(
    folder: Path,
    last: records.Submission,
    made: list[attempts.Attempt],
    came: Progress,
) -> dict[str, Any]:
    return {
        "run": history.name_of(folder),
        "folder": str(folder),
        "job_id": last.job_id,
        "cluster": last.cluster or None,
        "submitted": last.submitted,
        "num_nodes": last.num_nodes,
        "attempts": len(made),
        "step": came.step,
        "max_steps": came.max_steps,
        "saved_step": checkpoints.newest_step(folder),
        "tokens_per_second": came.tokens_per_second,
    }


def _seconds(time_left: str) -> int | None:
    try:
        return notation.seconds(time_left)
    except ValueError:
        # "INVALID" and the like, past the limit.
        return None


def _is_recent(folder: Path, made: list[attempts.Attempt]) -> bool:
    return time.time() - _last_sign(folder, made) < RECENT_S


def _last_sign(folder: Path, made: list[attempts.Attempt]) -> float:
    """Return when something was last written about the run's jobs."""
    places = [folder / "jobs.jsonl"]
    if made:
        names = ("slurm.json", "batch.log", "node-0.log", "outcome.json")
        places += [made[-1].folder / name for name in names]
    times = []
    for place in places:
        try:
            times.append(place.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)
