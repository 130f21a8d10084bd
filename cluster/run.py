"""`make run`, `make dry-run` and `make fetch`: a job on this machine, by the road that Slurm takes.

    python -m cluster.run --job tinyllama --accel zero2 --nproc 2 -- --max_steps 300
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from jsonargparse import ArgumentParser

from cluster import job as jobs
from cluster import runs
from cluster.errors import UserError

EXIT_REQUEUE = 75
# Below the range from which the kernel takes ports for outgoing connections.
PORTS = range(20_000, 30_000)


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    cut = argv.index("--") if "--" in argv else len(argv)
    script_arguments = argv[cut + 1 :]
    parser = ArgumentParser(prog="cluster.run", description="Run a job on this machine.")
    parser.add_argument("--job", default="tinyllama", help="a file of configs/jobs")
    parser.add_argument("--accel", default="", help="a file of configs/accelerate; default: ddp")
    parser.add_argument("--nproc", default="", help="processes; default: the GPUs, or 1")
    parser.add_argument("--run", default="", help="continue this run")
    parser.add_argument("--name", default="", help="a word to find the run again by")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--fetch", action="store_true", help="only put in place what the job reads")
    options = parser.parse_args(argv[:cut])
    try:
        if options.fetch:
            return fetch(options.job, script_arguments)
        if options.dry_run:
            script_arguments = ["--dry_run", *script_arguments]
        return run(
            options.job,
            accel=options.accel,
            num_processes=_number_of_processes(options.nproc, 2 if options.dry_run else None),
            continued=options.run,
            name=options.name,
            script_arguments=script_arguments,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def fetch(job_name: str, script_arguments: list[str]) -> int:
    """Download, tokenize and pack what the job reads; return the exit code."""
    job = jobs.load(job_name)
    command = [sys.executable, "-m", "train.fetch", job.module, "--online", "--"]
    code = subprocess.call([*command, "--config", str(job.path), *script_arguments], env=_environment())
    if code == 0:
        print(f"staged in {_datasets_folder()}; the job needs no network now")
    return code


def run(
    job_name: str,
    *,
    accel: str,
    num_processes: int,
    continued: str,
    name: str,
    script_arguments: list[str],
) -> int:
    """Resolve, record and run a job with one launcher on this machine; return its exit code.

    Raises:
        UserError: anything that can be known to be wrong before the launch.
    """
    environment = _environment()
    environment |= {"SLUICE_WORLD_SIZE": str(num_processes), "HF_HUB_OFFLINE": "1"}
    if continued:
        folder = runs.find(continued)
        runs.check_free(folder)
        earlier = runs.record(folder)
        job_name, accel = earlier["job"], accel or earlier["accel"]
    job = jobs.load(job_name)
    accel = accel or "ddp"
    jobs.strategy_file(accel)
    settings = folder / "config.yaml" if continued else job.path
    config = _resolve(job, ["--config", str(settings), *script_arguments], environment)
    if isinstance(config, int):
        return config
    if continued:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    else:
        folder = runs.runs_folder() / runs.new_name(job.name, name)
        record = {
            "job": job.name,
            "accel": accel,
            "num_nodes": 1,
            "num_processes": num_processes,
            "resources": asdict(job.resources),
            "command": shlex.join(["make", "run", f"JOB={job.name}", f"ACCEL={accel}"])
            + f" NPROC={num_processes} ARGS={shlex.quote(shlex.join(script_arguments))}",
        }
        runs.create(folder, config=config, record=record)
    attempt = runs.new_attempt(folder)
    print(f"run folder {_short(folder)} (on the host, no container), attempt {attempt}", flush=True)
    with tempfile.TemporaryDirectory(prefix="sluice-") as scratch:
        devices = _gpus()
        environment |= {
            "SLUICE_PYTHON": sys.executable,
            "SLUICE_MODULE": job.module,
            "SLUICE_ACCEL": accel,
            "SLUICE_NUM_NODES": "1",
            "SLUICE_NODE_RANK": "0",
            "SLUICE_MASTER_ADDR": "127.0.0.1",
            "SLUICE_MASTER_PORT": str(_free_port()),
            "SLUICE_RUN_FOLDER": str(folder),
            "SLUICE_ATTEMPT": str(attempt),
            "SLUICE_SCRATCH": scratch,
            "SLUICE_DEVICE": "cuda" if devices else "cpu",
            "SLUICE_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_processes)),
        }
        command = [folder / "code/slurm/node.sh", "--config", folder / "config.yaml"]
        code = _run_logged(command, environment, folder / "attempts" / str(attempt) / "node-0.log")
    _say_what_next(folder, attempt, code)
    return code


def _resolve(job: jobs.Job, script_arguments: list[str], environment: dict[str, str]) -> str | int:
    """Return the job's settings as the script resolves them, or the exit code of its refusal."""
    with tempfile.TemporaryDirectory(prefix="sluice-") as scratch:
        resolved = Path(scratch) / "config.yaml"
        command = [sys.executable, "-m", "train.fetch", job.module, f"--resolved={resolved}", "--"]
        code = subprocess.call([*command, *script_arguments], env=environment)
        # --help was asked for: everything is said.
        return resolved.read_text(encoding="utf-8") if resolved.exists() else code


def _run_logged(command: list[str | Path], environment: dict[str, str], log: Path) -> int:
    """Run a command, its output shown and logged; return its exit code.

    A signal is passed on, not obeyed: the processes save first, and this waits for them.
    """
    terminal = sys.stderr.isatty()
    environment = environment | {"SLUICE_TERMINAL": "1" if terminal else "0", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

        def pass_on(number: int, _: Any) -> None:
            # Ctrl+C reaches the whole foreground group by itself.
            if number != signal.SIGINT:
                process.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, pass_on)
        assert process.stdout is not None and process.stderr is not None
        copies = [
            threading.Thread(target=_copy, args=(process.stdout, sys.stdout.buffer, stream)),
            threading.Thread(target=_copy, args=(process.stderr, sys.stderr.buffer, stream)),
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.join()
        return process.wait()


def _copy(source: IO[bytes], shown: IO[bytes], log: IO[bytes]) -> None:
    """Copy a process's output as it comes; an error that several ranks say is shown once."""
    said: set[bytes] = set()
    rest = b""
    while data := os.read(source.fileno(), 65536):
        *lines, rest = (rest + data).split(b"\n")
        # A progress bar has no line ends: what is not an error is shown at once.
        if not rest.startswith(b"error: "):
            lines, rest = [*lines, rest], b""
            text = b"\n".join(line for line in lines if not _repeated(line, said))
        else:
            text = b"".join(line + b"\n" for line in lines if not _repeated(line, said))
        for target in (shown, log):
            target.write(text)
            target.flush()
    if rest and not _repeated(rest, said):
        for target in (shown, log):
            target.write(rest)
            target.flush()


def _repeated(line: bytes, said: set[bytes]) -> bool:
    if not line.startswith(b"error: "):
        return False
    if line in said:
        return True
    said.add(line)
    return False


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
        print(f"      tensorboard --logdir {_short(folder / 'tensorboard')}")
    elif outcome.get("outcome") == "stopped":
        print(f"\nstopped at step {outcome['step']} ({outcome['reason']}), saved")
        print(f"continue with: make run RUN={name}")
    elif code:
        print(f"\nfailed with exit code {code}; log: {_short(path.parent / 'node-0.log')}")
        print(f"continue from the last checkpoint with: make run RUN={name}")


def _environment() -> dict[str, str]:
    return os.environ | {"SLUICE_DATASETS": str(_datasets_folder()), "PYTHONNOUSERSITE": "1"}


def _datasets_folder() -> Path:
    return Path(os.environ.get("SLUICE_DATASETS", "datasets")).absolute()


def _number_of_processes(given: str, default: int | None) -> int:
    if not given:
        return default or max(1, len(_gpus()))
    if not given.isdigit() or int(given) < 1:
        raise UserError(f"NPROC={given}: is not a number of processes (1 or more)")
    if _gpus() and int(given) > len(_gpus()):
        raise UserError(f"NPROC={given}: this machine has {len(_gpus())} GPUs, one for each process")
    return int(given)


def _gpus() -> list[str]:
    """Return the GPUs that torch will see here, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device.strip() not in ("", "-1")]
    return [path.name for path in Path("/dev").glob("nvidia[0-9]*")]


def _free_port() -> int:
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise UserError("no free port between 20000 and 30000 on this machine")


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
