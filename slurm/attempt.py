"""The attempts of a run: their numbers, how they ended, and whether the job goes on.

    python slurm/attempt.py begin --job 12 --restarts 0 --nodes "node1 node2" --master A:P
    python slurm/attempt.py end --code 75 --state RUNNING

slurm/train.sbatch calls it on the first node, in the job's own container. `begin` prints the
attempt's number, `end` prints requeue, cancel, stop or leave, and the nodes that a requeue has to
leave out; both say why on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

# So many attempts in a row may fail at the step where they began, and so many may end there in any
# way: one that was asked to stop, or lost its node, may have had bad luck.
MAX_FAILED_WITHOUT_PROGRESS = 2
MAX_WITHOUT_PROGRESS = 5
BAD_INPUT = 2
SAVED = 75
# The exit codes of slurm/preflight.py where nodes are to blame, and where it cannot be told which.
GUILTY_NODES = 3
SUSPECT_NODES = 5
GIVEN_UP = 4
NO_REQUEUE = "Slurm does not queue this job again (Requeue=0)"


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    begin_parser, end_parser = commands.add_parser("begin"), commands.add_parser("end")
    begin_parser.add_argument("--job", type=int, required=True)
    begin_parser.add_argument("--restarts", type=int, required=True)
    begin_parser.add_argument("--nodes", required=True)
    begin_parser.add_argument("--master", required=True)
    for each in (begin_parser, end_parser):
        each.add_argument(
            "--requeues", default="yes", choices=["yes", "no"], help="if Slurm queues the job again"
        )
    end_parser.add_argument("--code", type=int, required=True)
    end_parser.add_argument("--state", required=True, help="the job's state, Slurm's word")
    end_parser.add_argument("--asked", default="", help="the signal that the job was sent")
    end_parser.add_argument("--preflight", action="store_true", help="it never came to training")
    end_parser.add_argument("--refused", default="", help="why Slurm started no processes")
    options = parser.parse_args(argv)
    run = Path(os.environ["SLUICE_RUN_FOLDER"])
    max_restarts = int(os.environ["SLUICE_MAX_RESTARTS"])
    if options.command == "begin":
        nodes = options.nodes.split()
        return begin(
            run,
            options.job,
            options.restarts,
            nodes,
            options.master,
            may_requeue=options.requeues == "yes",
            max_restarts=max_restarts,
        )
    return end(
        run,
        options.code,
        options.state,
        asked=options.asked,
        preflight=options.preflight,
        refused=options.refused,
        may_requeue=options.requeues == "yes",
        max_restarts=max_restarts,
    )


def begin(
    run: Path,
    job_id: int,
    restarts: int,
    nodes: list[str],
    master: str,
    *,
    may_requeue: bool,
    max_restarts: int,
) -> int:
    """Make the folder of the next attempt; or give up, if the job was restarted too often."""
    attempts = run / "attempts"
    attempts.mkdir(exist_ok=True)
    number = max(_numbers(attempts), default=0)
    if number and not (attempts / str(number) / "outcome.json").exists():
        # Slurm started the job again by itself, after a node's death or a preemption without grace.
        _write(
            attempts / str(number) / "outcome.json",
            {"outcome": "lost", "step": newest_step(run), "reason": "Slurm ended it"},
        )
    if restarts and (why := too_often(run, job_id, max_restarts)):
        print(f"error: not started again: {why}", file=sys.stderr)
        _annotate(attempts / str(number), next_="stop", why=why)
        return GIVEN_UP
    folder = attempts / str(number + 1)
    folder.mkdir()
    record = {
        "job_id": job_id,
        "restart_count": restarts,
        "nodes": nodes,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": newest_step(run),
        "master": master,
        "requeues": may_requeue,
    }
    _write(folder / "slurm.json", record)
    print(number + 1)
    return 0


def end(
    run: Path,
    code: int,
    state: str,
    *,
    asked: str,
    preflight: bool,
    refused: str,
    may_requeue: bool,
    max_restarts: int,
) -> int:
    """Record how the newest attempt ended, and print what the batch script does now."""
    attempts = run / "attempts"
    folder = attempts / str(max(_numbers(attempts)))
    job_id = _read(folder / "slurm.json")["job_id"]
    if not (folder / "outcome.json").exists():
        if preflight:
            kind, reason = "unhealthy", "the preflight found the allocation unfit"
        elif asked or code in (0, SAVED):
            kind, reason = "stopped", f"{asked or 'asked to stop'} before it could save"
        elif refused:
            kind, reason = "failed", f"Slurm did not start its processes: {refused}"
        else:
            kind, reason = "failed", f"exit code {code}"
        _write(
            folder / "outcome.json",
            {"outcome": kind, "step": newest_step(run), "reason": reason, "exit_code": code},
        )
    _keep_settings(run, refused=code == BAD_INPUT)
    outcome = _read(folder / "outcome.json")
    decision, why = decide(run, outcome, job_id, code, state, max_restarts)
    if decision == "requeue" and not may_requeue:
        decision, why = "stop", NO_REQUEUE
    if decision == "cancel":
        outcome["outcome"] = "cancelled"
        _write(folder / "outcome.json", outcome)
    _annotate(folder, next_="stop" if decision == "cancel" else decision, why=why)
    print(f"{outcome['outcome']} at step {outcome['step']}: {why}", file=sys.stderr)
    # Where the nodes were ended in the midst of it, the verdict means nothing.
    is_verdict = outcome["outcome"] == "unhealthy"
    verdict = _read(folder / "preflight/verdict.json") if is_verdict else {}
    print(decision, ",".join(verdict.get("guilty") or verdict.get("suspects") or []))
    return 0


def _keep_settings(run: Path, *, refused: bool) -> None:
    """Put back the settings of before, if the run refused those that it was continued with."""
    before = run / "config.before.yaml"
    if before.exists() and refused:
        before.replace(run / "config.yaml")
    before.unlink(missing_ok=True)


def decide(
    run: Path, outcome: dict[str, Any], job_id: int, code: int, state: str, max_restarts: int
) -> tuple[str, str]:
    """Return requeue, cancel, stop or leave (to Slurm, which is ending the job), and why."""
    if outcome["outcome"] == "finished":
        return "stop", "nothing is left to do"
    # Listed, not opened: over NFS a file that was not there a moment ago is found this way.
    if (request := run / "cancel.json") in run.iterdir():
        asked = _read(request).get("job_id")
        request.unlink()
        if asked == job_id:
            return "cancel", "as `make cancel` asked"
    # Empty: Slurm could not be asked.
    if state not in ("", "RUNNING", "CONFIGURING"):
        return "leave", f"Slurm has the job as {state}, and decides"
    if code == BAD_INPUT and outcome["outcome"] == "failed":
        return "stop", "the same input would fail again; the error is in node-0.log"
    if outcome["outcome"] == "unhealthy" and code not in (GUILTY_NODES, SUSPECT_NODES):
        return "stop", "all nodes are alike, so that others would not help"
    if why := too_often(run, job_id, max_restarts):
        return "stop", why
    return "requeue", "goes on from its last checkpoint"


def too_often(run: Path, job_id: int, max_restarts: int) -> str:
    """Return why a job must not be started once more; empty if it may be.

    A job that saves at its time limit and trains in between may do so without end.
    """
    mine = []
    for number in sorted(_numbers(run / "attempts")):
        folder = run / "attempts" / str(number)
        began = _read(folder / "slurm.json")
        if began.get("job_id") == job_id:
            mine.append((began, _read(folder / "outcome.json")))
    without = failed = 0
    for began, outcome in reversed(mine):
        is_unhealthy = outcome.get("outcome") == "unhealthy"
        if is_unhealthy and outcome.get("exit_code") != SUSPECT_NODES:
            continue
        if outcome.get("step", 0) > began.get("step", 0):
            break
        without += 1
        failed += is_unhealthy or outcome.get("outcome") == "failed"
    if failed >= MAX_FAILED_WITHOUT_PROGRESS or without >= MAX_WITHOUT_PROGRESS:
        return f"{without} attempts in a row made no progress (step {newest_step(run)})"
    failures = sum(outcome.get("outcome") in ("failed", "unhealthy") for _, outcome in mine)
    if failures > max_restarts:
        return f"{failures} attempts failed, and resources.max_restarts is {max_restarts}"
    return ""


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint that was published, 0 without one."""
    names = [path.name for path in (run / "checkpoints").glob("step-*")]
    steps = [int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name)]
    return max(steps, default=0)


def _numbers(attempts: Path) -> list[int]:
    return [int(path.name) for path in attempts.iterdir() if path.name.isdigit()]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # An attempt whose node died while it wrote, or one of `make run`.
        return {}
    return content if isinstance(content, dict) else {}


def _annotate(folder: Path, *, next_: str, why: str) -> None:
    outcome = _read(folder / "outcome.json")
    _write(folder / "outcome.json", outcome | {"next": next_, "why": why})


def _write(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
