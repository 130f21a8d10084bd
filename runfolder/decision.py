"""What a job does after an attempt: continue or end, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runfolder import attempts, checkpoints, records
from runfolder.exit_codes import EXIT_BAD_INPUT
from runfolder.files import read_json, write_atomically

# How many attempts in a row may fail at the step where they began, and how many may end there in
# any way: one that was asked to stop, or lost its node, may have had bad luck.
MAX_FAILED_WITHOUT_PROGRESS = 2
MAX_WITHOUT_PROGRESS = 5
# Exit codes of the preflight's verdict. Alike: all nodes have the same problem, so no single node
# is at fault. Guilty: the faulty nodes were named. Suspect: it is unknown which node is at fault.
ALL_NODES_ALIKE, GUILTY_NODES, SUSPECT_NODES = 1, 3, 5


def decide(
    run: Path, outcome: dict[str, Any], job_id: int, code: int, state: str, max_restarts: int
) -> tuple[str, str]:
    """Return requeue, cancel, stop or leave (to Slurm, which is ending the job), and why."""
    if outcome["outcome"] == "finished":
        return "stop", "nothing is left to do"
    if is_cancel_requested(run, job_id):
        return "cancel", "requested by `make cancel`"
    # Empty: Slurm could not be asked.
    if state not in ("", "RUNNING", "CONFIGURING", "RESIZING", "SIGNALING"):
        return "leave", f"Slurm shows the job as {state}, and decides what happens next"
    if code == EXIT_BAD_INPUT and outcome["outcome"] == "failed":
        return "stop", "the same input would fail again; the error is in node-0.log"
    if outcome["outcome"] == "unhealthy" and code not in (GUILTY_NODES, SUSPECT_NODES):
        return "stop", "all nodes have the same problem, so other nodes would not help"
    if why := too_often(run, job_id, max_restarts):
        return "stop", why
    if not outcome.get("saved", True):
        return "requeue", "starts over: it has saved nothing where its job file says it saves"
    return "requeue", "continues from its last checkpoint"


def too_often(run: Path, job_id: int, max_restarts: int) -> str:
    """Return why a job must not be started again; empty if it may be.

    A job that saves at its time limit and makes progress may do so any number of times.
    """
    mine = [
        (attempt.slurm or {}, attempt.outcome or {})
        for attempt in attempts.read_all(run)
        if (attempt.slurm or {}).get("job_id") == job_id
    ]
    without = failed = 0
    for began, outcome in reversed(mine):
        is_unhealthy = outcome.get("outcome") == "unhealthy"
        if is_unhealthy and outcome.get("exit_code") != SUSPECT_NODES:
            continue
        if attempts.has_progressed(began, outcome):
            break
        without += 1
        failed += is_unhealthy or outcome.get("outcome") == "failed"
    if failed >= MAX_FAILED_WITHOUT_PROGRESS or without >= MAX_WITHOUT_PROGRESS:
        program = records.program(run)
        where = f"step {checkpoints.newest_step(run) or 0}"
        if program:
            where = f"no optimizer step and newer file in {program['checkpoints']}"
        return f"{without} attempts in a row made no progress ({where})"
    failures = sum(outcome.get("outcome") in ("failed", "unhealthy") for _, outcome in mine)
    if failures > max_restarts:
        return f"{failures} attempts failed, and resources.max_restarts is {max_restarts}"
    return ""


# ---- the request of `make cancel` ----


def request_cancel(run: Path, job_id: int) -> None:
    """Ask a job to save and end.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(run / "cancel.json", json.dumps({"job_id": job_id}) + "\n")


def is_cancel_requested(run: Path, job_id: int) -> bool:
    """Return whether this job was asked to end."""
    return (read_json(run / "cancel.json") or {}).get("job_id") == job_id


def forget_cancel(run: Path) -> None:
    """Withdraw the request, whichever job it was for.

    Raises:
        OSError: it cannot be deleted.
    """
    (run / "cancel.json").unlink(missing_ok=True)
