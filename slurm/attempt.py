"""Records attempts for the batch script: begins one, ends it, says what comes next.

    python -m slurm.attempt begin --job 12 --restarts 0 --nodes "node1 node2" --by-name ...
    python -m slurm.attempt end --code 75 --state RUNNING

slurm/train.sbatch calls it on the first node, in the job's own container. `begin` prints the
attempt's number, and address and port where its processes meet; `end` prints requeue, cancel, stop
or leave, and the nodes that a requeue must exclude; both give the reason on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from runfolder import attempts, decision, launch, packages, settings
from runfolder.errors import UserError
from runfolder.exit_codes import EXIT_BAD_INPUT, EXIT_SAVED
from runfolder.files import read_json
from slurm.rendezvous import meeting_point

GIVEN_UP = 4
NO_REQUEUE = "Slurm does not requeue this job (Requeue=0)"


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    begin_parser, end_parser = commands.add_parser("begin"), commands.add_parser("end")
    begin_parser.add_argument("--job", type=int, required=True)
    begin_parser.add_argument("--restarts", type=int, required=True)
    begin_parser.add_argument("--nodes", required=True)
    begin_parser.add_argument("--interface", help="ip's output for the site's interface")
    begin_parser.add_argument("--by-name", default="", help="getent's output for the first node")
    begin_parser.add_argument("--by-slurm", default="", help="getent's output for its NodeAddr")
    for each in (begin_parser, end_parser):
        each.add_argument(
            "--requeues",
            default="yes",
            choices=["yes", "no"],
            help="whether Slurm requeues the job",
        )
    end_parser.add_argument("--code", type=int, required=True)
    end_parser.add_argument("--state", required=True, help="the job's state, as Slurm has it")
    end_parser.add_argument("--asked", default="", help="the signal that the job received")
    end_parser.add_argument("--preflight", action="store_true", help="training never started")
    end_parser.add_argument("--refused", default="", help="why Slurm started no processes")
    options = parser.parse_args(argv)
    run = Path(os.environ["SLUICE_RUN_FOLDER"])
    try:
        return begin(run, options) if options.command == "begin" else end(run, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def begin(run: Path, options: argparse.Namespace) -> int:
    """Create the next attempt's folder; or give up a job that must not start again."""
    attempts.close_last(run, by_job=True)
    # An image is the same file, but an environment on the host may have changed since.
    why = packages.changed(run, packages.installed(), "now")
    if options.restarts:
        why = why or decision.too_often(run, options.job, _max_restarts(run))
    if why:
        print(f"error: not started again: {why}", file=sys.stderr)
        for number in attempts.numbers(run)[-1:]:
            attempts.annotate(run, number, next="stop", why=why)
        return GIVEN_UP
    address, port = meeting_point(
        of_interface=options.interface,
        by_name=options.by_name,
        by_slurm=options.by_slurm,
        job_id=options.job,
        restarts=options.restarts,
        num_nodes=len(options.nodes.split()),
    )
    where = {
        "job_id": options.job,
        "restart_count": options.restarts,
        "nodes": options.nodes.split(),
        "master": f"{address}:{port}",
        "requeues": options.requeues == "yes",
    }
    print(attempts.begin(run, where), address, port)
    return 0


def end(run: Path, options: argparse.Namespace) -> int:
    """Record how the newest attempt ended, and print what the batch script does now."""
    attempt = attempts.read(run, attempts.current())
    if attempts.numbers(run)[-1] != attempt.number:
        # The node of this script was cut off, and Slurm has started the job elsewhere since.
        print(f"error: attempt {attempt.number} is no longer the newest", file=sys.stderr)
        print("leave")
        return 0
    code, asked = options.code, options.asked
    outcome = attempt.outcome
    if outcome is None:
        if options.preflight:
            kind, reason = "unhealthy", "the preflight found the allocation unfit"
        elif asked or code in (0, EXIT_SAVED):
            kind, reason = "stopped", f"{asked or 'asked to stop'} before it could save"
        elif options.refused:
            kind, reason = "failed", f"Slurm did not start its processes: {options.refused}"
        else:
            kind, reason = "failed", f"exit code {code}"
        outcome = attempts.write_outcome(
            run, number=attempt.number, outcome=kind, reason=reason, exit_code=code
        )
    if outcome.get("exit_code") == EXIT_BAD_INPUT:
        # srun returns the highest of the nodes' codes, even of one that it had to kill.
        code = EXIT_BAD_INPUT
    settings.settle(run, refused=code == EXIT_BAD_INPUT)
    job_id = (attempt.slurm or {})["job_id"]
    choice, why = decision.decide(run, outcome, job_id, code, options.state, _max_restarts(run))
    if choice == "requeue" and options.requeues == "no":
        choice, why = "stop", NO_REQUEUE
    is_cancelled = {"outcome": "cancelled", "next": "stop"} if choice == "cancel" else {}
    outcome = attempts.annotate(run, attempt.number, **{"next": choice, "why": why, **is_cancelled})
    # Only after that is recorded: a second try must find the request, too.
    decision.forget_cancel(run)
    print(f"{outcome['outcome']} at step {outcome['step']}: {why}", file=sys.stderr)
    # If the nodes were stopped during the preflight, the verdict means nothing.
    verdict: dict[str, Any] = {}
    if outcome["outcome"] == "unhealthy":
        folder = attempts.preflight_folder(run, attempt.number)
        verdict = read_json(folder / "verdict.json") or {}
    print(choice, ",".join(verdict.get("guilty") or verdict.get("suspects") or []))
    return 0


def _max_restarts(run: Path) -> int:
    return int(launch.read(run)["max_restarts"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
