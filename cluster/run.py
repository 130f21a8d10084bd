"""`make run`, `make dry-run` and `make fetch`: a job on this machine, by the road that Slurm takes.

python -m cluster.run --job tinyllama --accel zero2 --nproc 2 -- --max_steps 300
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from cluster import job as jobs
from cluster import machine, runs
from cluster.errors import UserError, run_to_exit
from cluster.output import run_logged


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    cut = argv.index("--") if "--" in argv else len(argv)
    script_arguments = argv[cut + 1 :]
    parser = _Parser(
        prog="python -m cluster.run",
        usage="%(prog)s [OPTION ...] [-- SETTING ...]",
        description="Run a job on this machine.",
        epilog="`-- --help` lists the settings of the job's script.",
        allow_abbrev=False,
    )
    parser.add_argument("--job", default="tinyllama", help="a file of configs/jobs (tinyllama)")
    parser.add_argument("--accel", default="", help="a file of configs/accelerate (ddp)")
    parser.add_argument("--nproc", default="", help="processes (one for each GPU, or 1)")
    parser.add_argument("--run", default="", help="continue this run")
    parser.add_argument("--name", default="", help="a word to find the run again by")
    parser.add_argument("--dry_run", action="store_true", help="a short pass on the CPU")
    parser.add_argument("--fetch", action="store_true", help="only put in place what the job reads")
    for size in ("nodes", "gpus", "time"):
        parser.add_argument(f"--{size}", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv[:cut])
    for size in ("nodes", "gpus", "time"):
        if getattr(options, size):
            raise UserError(
                f"{size.upper()}={getattr(options, size)}: is for a cluster; this machine runs the "
                "job alone, in as many processes as NPROC says"
            )
    if options.fetch:
        return fetch(options.job, script_arguments)
    if options.dry_run:
        script_arguments = ["--dry_run", *script_arguments]
    return run(
        options.job,
        accel=options.accel,
        num_processes=_number(options.nproc),
        continued=options.run,
        name=options.name,
        dry_run=options.dry_run,
        script_arguments=script_arguments,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists the options")


def fetch(job_name: str, script_arguments: list[str]) -> int:
    """Download, tokenize and pack what the job reads; return the exit code."""
    job = jobs.load(job_name)
    command = [sys.executable, "-m", "train.fetch", job.module, "--online", "--"]
    command += ["--config", str(job.path), *script_arguments]
    code = subprocess.call(command, env=_environment())
    if code == 0:
        print(f"staged in {_datasets_folder()}; the job needs no network now")
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
) -> int:
    """Resolve, record and run a job with one launcher on this machine; return its exit code.

    A run that is continued goes on with the code and the settings in its folder.

    Raises:
        UserError: anything that can be known to be wrong before the launch.
    """
    devices = [] if dry_run else machine.gpus()
    default = 2 if dry_run else max(1, len(devices))
    if continued:
        folder = runs.find(continued)
        runs.check_free(folder)
        record = runs.record(folder)
        accel, default = accel or record["accel"], record["num_processes"]
        settings, code_folder = folder / "config.yaml", folder / "code"
    else:
        job = jobs.load(job_name)
        folder, accel = runs.new_folder(job.name, name), accel or "ddp"
        record = {"job": job.name, "module": job.module, "resources": asdict(job.resources)}
        settings, code_folder = job.path, Path.cwd()
    jobs.strategy_file(accel)
    num_processes = num_processes or default
    if devices and num_processes > len(devices):
        raise UserError(
            f"NPROC={num_processes}: this machine has {len(devices)} GPUs, one for each process"
        )
    environment = _environment()
    environment |= {"SLUICE_WORLD_SIZE": str(num_processes), "HF_HUB_OFFLINE": "1"}
    if not devices:
        # Or torch would use the GPUs that there are.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    config = _resolve(
        record["module"], ["--config", str(settings), *script_arguments], environment, code_folder
    )
    if isinstance(config, int):
        return config
    if continued:
        settings.write_text(config, encoding="utf-8")
    else:
        make = ["make", "run", f"JOB={job.name}", f"ACCEL={accel}", f"NPROC={num_processes}"]
        record |= {"accel": accel, "num_nodes": 1, "num_processes": num_processes}
        record["command"] = shlex.join([*make, f"ARGS={shlex.join(script_arguments)}"])
        runs.create(folder, config=config, record=record)
    attempt = runs.new_attempt(folder)
    print(f"run folder {_short(folder)} (on the host, no container), attempt {attempt}", flush=True)
    with tempfile.TemporaryDirectory(prefix="sluice-") as scratch:
        environment |= {
            "PYTHONUNBUFFERED": "1",
            "SLUICE_TERMINAL": "1" if sys.stderr.isatty() else "0",
            "SLUICE_PYTHON": sys.executable,
            "SLUICE_MODULE": record["module"],
            "SLUICE_ACCEL": accel,
            "SLUICE_NUM_NODES": "1",
            "SLUICE_NODE_RANK": "0",
            "SLUICE_MASTER_ADDR": "127.0.0.1",
            "SLUICE_MASTER_PORT": str(machine.free_port()),
            "SLUICE_RUN_FOLDER": str(folder),
            "SLUICE_ATTEMPT": str(attempt),
            "SLUICE_SCRATCH": scratch,
            "SLUICE_DEVICE": "cuda" if devices else "cpu",
            "SLUICE_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_processes)),
        }
        command: list[str | Path] = [
            folder / "code/slurm/node.sh",
            "--config",
            folder / "config.yaml",
        ]
        log = folder / "attempts" / str(attempt) / "node-0.log"
        code = run_logged(command, environment, log)
    _say_what_next(folder, attempt, code)
    return code


def _resolve(
    module: str, script_arguments: list[str], environment: dict[str, str], code_folder: Path
) -> str | int:
    """Return the job's settings as the script resolves them, or the exit code of its refusal."""
    with tempfile.TemporaryDirectory(prefix="sluice-") as scratch:
        resolved = Path(scratch) / "config.yaml"
        # -P: the code of the run that is continued, not that of the current folder.
        command = [sys.executable, "-P", "-m", "train.fetch", module, f"--resolved={resolved}"]
        code = subprocess.call(
            [*command, "--", *script_arguments],
            env=environment | {"PYTHONPATH": _python_path(code_folder)},
        )
        # --help was asked for: everything is said.
        return resolved.read_text(encoding="utf-8") if resolved.exists() else code


def _python_path(code_folder: Path) -> str:
    given = os.environ.get("PYTHONPATH")
    return f"{code_folder}{os.pathsep}{given}" if given else str(code_folder)


def _say_what_next(folder: Path, attempt: int, code: int) -> None:
    path = folder / "attempts" / str(attempt) / "outcome.json"
    outcome = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    name = folder.relative_to(folder.parent.parent)
    if outcome.get("outcome") == "finished":
        print(f"\nfinished at step {outcome['step']}")
        print(f"  run folder   {_short(folder)}")
        print(f"  checkpoint   {_short(folder / 'checkpoints' / outcome['checkpoint'])}")
        if (folder / "export").is_dir():
            print(f"  model        {_short(folder / 'export')}  (Hugging Face format)")
        print(f'next: make generate RUN={name} PROMPT="The cluster"')
        tensorboard = _short(Path(sys.executable).with_name("tensorboard"))
        print(f"      {tensorboard} --logdir {_short(folder / 'tensorboard')}")
    elif outcome.get("outcome") == "stopped":
        print(f"\nstopped at step {outcome['step']} ({outcome['reason']}), saved")
        print(f"continue with: make run RUN={name}")
    elif code:
        # A script that ended well has said so; this one could not.
        path.write_text(json.dumps({"outcome": "failed", "exit_code": code}, indent=2) + "\n")
        print(f"\nfailed with exit code {code}; log: {_short(path.parent / 'node-0.log')}")
        if any((folder / "checkpoints").glob("step-*")):
            print(f"continue from the last checkpoint with: make run RUN={name}")


def _environment() -> dict[str, str]:
    """Return the environment for the training side, with the places of what it reads."""
    cache = Path(os.environ.get("SLUICE_CACHE", "cache")).absolute()
    # Where `hf auth login` puts the token, which is not part of the cache.
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"
    no_bars = "0" if sys.stderr.isatty() else "1"
    defaults = {
        "HF_HUB_DISABLE_PROGRESS_BARS": no_bars,
        "HF_DATASETS_DISABLE_PROGRESS_BARS": no_bars,
        # Requests for statistics alone; without a network each would wait on its own.
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    }
    if "HF_HOME" not in os.environ:
        defaults |= {"HF_HOME": str(cache / "huggingface"), "HF_TOKEN_PATH": str(home / "token")}
    ours = {"SLUICE_DATASETS": str(_datasets_folder()), "PYTHONNOUSERSITE": "1"}
    return defaults | dict(os.environ) | ours


def _datasets_folder() -> Path:
    return Path(os.environ.get("SLUICE_DATASETS", "datasets")).absolute()


def _number(given: str) -> int | None:
    if not given:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", given) or int(given) < 1:
        raise UserError(f"NPROC={given}: is not a number of processes (1 or more)")
    return int(given)


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    run_to_exit(main)
