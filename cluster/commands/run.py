"""`make run`, `make dry-run` and `make fetch`: a job on this machine, the same way as under Slurm.

python -m cluster run --job tinyllama --accel zero2 --nproc 2 -- --max_steps 300
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cluster.commands.output import run_logged
from cluster.commands.plan import check_no_job
from cluster.errors import Parser, split_at_dashes
from cluster.plan import container, machine, resolve
from cluster.plan.job import load_job
from cluster.plan.launch import resolve_launch
from cluster.plan.request import Request, whole_number
from cluster.plan.runtime import choose_runtime, variants
from cluster.plan.source import command_of, new_run, note_surprises, run_that_goes_on
from cluster.runs import clusters, folders, history
from cluster.site.file import load_site
from cluster.slurm.call import private_folder
from runfolder import attempts, checkpoints, moments, ports, records, settings
from runfolder.errors import UserError
from runfolder.exit_codes import EXIT_BAD_INPUT


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    own, script_arguments = split_at_dashes(argv)
    parser = Parser(
        prog="python -m cluster run",
        usage="%(prog)s [OPTION ...] [-- SETTING ...]",
        description="Run a job on this machine.",
        epilog="`-- --help` lists the settings of the job's script.",
        allow_abbrev=False,
    )
    parser.add_argument("--job", default="tinyllama", help="a file of configs/jobs (tinyllama)")
    parser.add_argument("--accel", default="", help="a file of configs/accelerate (ddp)")
    parser.add_argument("--nproc", default="", help="processes (default: one per GPU, or 1)")
    parser.add_argument("--run", default="", help="continue this run")
    parser.add_argument("--name", default="", help="a name to find the run by")
    parser.add_argument("--runtime", default="", help="apptainer or host (default: what is there)")
    parser.add_argument("--image", default="", help="the image (default: one of images/)")
    parser.add_argument("--dry_run", action="store_true", help="a short pass on the CPU")
    parser.add_argument("--fetch", action="store_true", help="only prepare what the job reads")
    for size in ("nodes", "gpus", "time"):
        parser.add_argument(f"--{size}", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(own)
    for size in ("nodes", "gpus", "time"):
        if getattr(options, size):
            raise UserError(
                f"{size.upper()}={getattr(options, size)}: is for a cluster; this machine alone "
                "runs the job, with NPROC= processes"
            )
    if options.fetch:
        return fetch(options.job, script_arguments, options.runtime, options.image)
    if options.dry_run:
        script_arguments = ["--dry_run", *script_arguments]
    return run(
        options.job,
        accel=options.accel,
        num_processes=whole_number("NPROC", options.nproc, 1),
        continued=options.run,
        name=options.name,
        dry_run=options.dry_run,
        script_arguments=script_arguments,
        runtime_name=options.runtime,
        image=options.image,
    )


def fetch(job_name: str, script_arguments: list[str], runtime_name: str, image: str) -> int:
    """Download, tokenize and pack what the job reads; return the exit code."""
    job = load_job(job_name)
    if job.program is not None:
        raise UserError(
            f"JOB={job_name}: only a script of Sluice's says what it reads; download what this one "
            "reads with its own tools, such as `hf download`"
        )
    runtime = choose_runtime(runtime_name, image, variants(gpus=bool(machine.gpus()), strict=False))
    print(f"fetching {runtime}", flush=True)
    environment = resolve.environment()
    code = container.call(
        runtime,
        "train.resolve",
        [job.module, "--online", "--", "--config", str(job.path), *script_arguments],
        code=Path.cwd(),
        environment=environment,
        writable=resolve.caches(environment) if runtime.image else [],
        online=True,
    )
    if code == 0:
        print(f"staged in {folders.datasets_folder()}; the job needs no network now")
    return code


def run(
    job_name: str,
    *,
    accel: str,
    num_processes: int | None,
    continued: str,
    name: str,
    dry_run: bool,
    script_arguments: list[str],
    runtime_name: str = "",
    image: str = "",
) -> int:
    """Resolve, record and run a job with one launcher on this machine; return its exit code.

    A run that is continued uses the code and the settings in its folder.

    Raises:
        UserError: anything that can be found to be wrong before the launch.
    """
    if continued:
        source = run_that_goes_on(continued, accel=accel)
        _check_not_queued(source.folder, continued)
        # One that began as a dry run stays on the CPU.
        before = yaml.safe_load(source.settings.read_text(encoding="utf-8"))
        dry_run = dry_run or bool(before.get("dry_run"))
    else:
        source = new_run(job_name, name=name, accel=accel)
        note_surprises(source, script_arguments)
    devices = [] if dry_run else machine.gpus()
    default = 2 if dry_run else max(1, len(devices))
    if continued:
        default = source.record["num_processes"]
    num_processes = num_processes or default
    if devices and num_processes > len(devices):
        raise UserError(
            f"NPROC={num_processes}: this machine has {len(devices)} GPUs, and each process needs "
            "one"
        )
    if not continued:
        command = command_of("run", source, {"NPROC": num_processes}, script_arguments)
        source = replace(source, record=source.record | {"command": command})
    runtime = choose_runtime(runtime_name, image, variants(gpus=bool(devices), strict=True))
    launch = resolve_launch(
        source,
        Request.of_this_machine(num_processes, num_gpus=len(devices)),
        runtime,
        script_arguments,
        is_terminal=sys.stderr.isatty(),
    )
    if isinstance(launch, int):
        return launch
    folder = source.folder
    if continued:
        _say_what_differs(source.record, runtime.record())
    launch.write()
    attempt = attempts.begin(folder)
    what = f"attempt {attempt}" + (" of a dry run" if continued and dry_run else "")
    print(f"run folder {resolve.short(folder)} ({runtime}), {what}", flush=True)
    with tempfile.TemporaryDirectory(prefix="sluice-") as scratch:
        code = run_logged(
            [folder / "code/slurm/node.sh", "--config", folder / "config.yaml"],
            _environment(folder, attempt, scratch),
            attempts.folder_of(folder, attempt) / "node-0.log",
        )
    # A refused run keeps its previous settings, as the next command expects.
    settings.settle(folder, refused=code == EXIT_BAD_INPUT)
    _say_what_next(folder, attempt, code)
    return code


def _check_not_queued(folder: Path, name: str) -> None:
    """Raise `UserError` if a job of the run is still in the queue and would continue it, too."""
    if not records.was_submitted(folder):
        return
    last = records.submissions(folder)[-1:]
    if last and history.is_final(last[0], attempts.read_all(folder)):
        return
    site = load_site()
    if shutil.which("sbatch") or (site.is_private and private_folder().is_dir()):
        check_no_job(clusters.chosen(site), folder, name)


def _environment(folder: Path, attempt: int, scratch: str) -> dict[str, str]:
    """Return the environment of slurm/node.sh: the caller's, and the variables of this attempt."""
    environment = resolve.environment()
    # What these mean to make is already resolved, in launch.env.
    kept = {
        key: value
        for key, value in environment.items()
        if not key.startswith("SLUICE_") or key == moments.VARIABLE
    }
    return kept | {
        "SLUICE_RUN_FOLDER": str(folder),
        "SLUICE_ATTEMPT": str(attempt),
        "SLUICE_NODE_RANK": "0",
        "SLUICE_SCRATCH": scratch,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ports.free_port()),
    }


def _say_what_differs(began: dict[str, Any], now: dict[str, Any]) -> None:
    """Say so if a run continues in a different image from the one it began in."""

    def said(record: dict[str, Any]) -> tuple[str, str | None]:
        image = record["image"]
        if image is None:
            return "on the host", None
        return f"in {image['path']} ({image['sha256'][:12]})", image["sha256"]

    # A run from before there were images has no record of one.
    if "runtime" in began and said(began)[1] != said(now)[1]:
        print(f"note: the run began {said(began)[0]}, now {said(now)[0]}", file=sys.stderr)


def _say_what_next(folder: Path, attempt: int, code: int) -> None:
    outcome = attempts.read(folder, attempt).outcome or {}
    name = folder.relative_to(folder.parent.parent)
    program = records.program(folder)
    if outcome.get("outcome") not in ("finished", "stopped"):
        if code:
            _say_failure(folder, attempt, code)
    elif program is not None:
        _say_end_of_program(folder, program, outcome)
    elif outcome["outcome"] == "finished":
        print(f"\nfinished at step {outcome['step']}")
        print(f"  run folder   {resolve.short(folder)}")
        print(f"  checkpoint   {resolve.short(folder / 'checkpoints' / outcome['checkpoint'])}")
        if (folder / "export").is_dir():
            print(f"  model        {resolve.short(folder / 'export')}  (Hugging Face format)")
        print(f"next: {history.command_of(outcome, str(name))}")
        # If there is an image, the environment may lack the training packages.
        first = "" if importlib.util.find_spec("tensorboard") else "containers/venv.sh && "
        # A module's PYTHONPATH is not for our Python, and the scripts of an environment that was
        # moved contain its old path.
        words = ["slurm/isolated.sh", resolve.short(Path(sys.executable)), "-m", "tensorboard.main"]
        words += ["--logdir", resolve.short(folder / "tensorboard")]
        print(f"      {first}{shlex.join(words)}")
    else:
        print(f"\nstopped at step {outcome['step']} ({outcome['reason']}), saved")
    if outcome.get("outcome") == "stopped":
        print(f"continue with: make run RUN={name}")


def _say_failure(folder: Path, attempt: int, code: int) -> None:
    # A script that ends in order records that; this one could not.
    attempts.write_outcome(folder, number=attempt, outcome="failed", exit_code=code)
    log = attempts.folder_of(folder, attempt) / "node-0.log"
    if code == 128 + signal.SIGINT:
        print("\ninterrupted before it could save")
    else:
        print(f"\nfailed with exit code {code}; log: {resolve.short(log)}")
    if checkpoints.newest_step(folder) is not None:
        name = folder.relative_to(folder.parent.parent)
        print(f"continue from the last checkpoint with: make run RUN={name}")


def _say_end_of_program(folder: Path, program: dict[str, Any], outcome: dict[str, Any]) -> None:
    """Say how a script that is not ours ended, and whether it has something to continue with."""
    if outcome["outcome"] == "finished":
        print(f"\nfinished after {_steps_of(outcome)}")
        print(f"  run folder   {resolve.short(folder)}")
    else:
        print(f"\nstopped after {_steps_of(outcome)} ({outcome['reason']})")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    # A dry run ends before most scripts save.
    if not outcome["saved"] and not config["dry_run"]:
        where = f"{resolve.short(folder)}/{program['checkpoints']}"
        print(f"note: nothing was saved in {where}: if continued, the script starts over")


def _steps_of(outcome: dict[str, Any]) -> str:
    """Return how many steps a script that is not ours has taken in this attempt."""
    steps = outcome["step"]
    if not outcome["counts_steps"]:
        return "no optimizer step of torch's; is this the script that trains?"
    return f"{steps:,} optimizer step{'s' if steps != 1 else ''}"
