"""A script, module or command that is not Sluice's, run as it is on each rank.

    python -m train.rider train.program --config runs/mine/.../config.yaml

It gets its own command line, its own folder on sys.path, and the run's folder as the working
directory. docs/your-script.md says what it is promised, and what its exit codes mean.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from runfolder import attempts
from runfolder.errors import UserError
from runfolder.exit_codes import EXIT_BAD_INPUT, EXIT_FAILED, of_system_exit
from runfolder.records import SCRIPT_FOLDER
from train import rider
from train.engine import signals

CODE = Path(__file__).absolute().parent.parent
OURS = {"cluster", "runfolder", "slurm", "train"}


def main(argv: list[str]) -> int:
    """Run the program of a run's config.yaml; return its exit code."""
    if argv[0].startswith("--find="):
        _find(argv[0].partition("=")[2], argv[1])
        return 0
    (path,) = (value for word, value in itertools.pairwise(argv) if word == "--config")
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    words = list(config["arguments"])
    if attempts.current() > 1:
        words += config["resume_arguments"]
    signals.die_with_launcher()
    if rider.current is not None:
        rider.current.strategy = os.environ.get("SLUICE_ACCEL", "ddp")
        rider.current.copies.may_differ = config["independent_ranks"]
        rider.current.end_after = config["dry_run_steps"] if config["dry_run"] else None
    _suit_device()
    os.chdir(os.environ["SLUICE_RUN_FOLDER"])
    code = _run(config["program"], words)
    if code == EXIT_BAD_INPUT and rider.current is not None and rider.current.steps:
        # That is what bad input is told by: it was found before the first step.
        return EXIT_FAILED
    return code


def _find(kind: str, name: str) -> None:
    """Raise `UserError` if no module, or command, of this name is installed."""
    if kind == "command":
        entry_point(name)
        return
    try:
        found = importlib.util.find_spec(name)
    except ImportError:
        found = None
    if found is None:
        raise UserError(f"module: {name}: is not installed here; mind the spelling")


def _suit_device() -> None:
    """Have accelerate do on CPUs what it does on GPUs, where it would do something else unsaid."""
    if os.environ.get("SLUICE_DEVICE") != "cpu":
        return
    # Its file says bf16, which is for GPUs.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        # Or processes that see no GPU would each be alone. With DeepSpeed it would mean plain DDP.
        os.environ["ACCELERATE_USE_CPU"] = "true"


def _run(program: dict[str, str], words: list[str]) -> int:
    kind, name = program["kind"], program["name"]
    path = str(CODE / name)
    sys.argv = [path if kind == "script" else name, *words]
    _leave(sys.modules)
    # A module may lie in the folder that was copied with the job.
    own = Path(path).parent if kind == "script" else CODE / SCRIPT_FOLDER
    if own.is_dir():
        sys.path.insert(0, str(own))
    try:
        if kind == "script":
            runpy.run_path(path, run_name="__main__")
        elif kind == "module":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            return of_system_exit(entry_point(name).load()())
    except SystemExit as ended:
        return of_system_exit(ended.code)
    except BaseException as error:
        # Its own lines, without those of the way to it.
        trace = error.__traceback__
        while trace and trace.tb_next and not _is_theirs(trace.tb_frame.f_code.co_filename):
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 130 if isinstance(error, KeyboardInterrupt) else EXIT_FAILED
    return 0


def _is_theirs(filename: str) -> bool:
    return filename != __file__ and "runpy" not in filename and "importlib" not in filename


def _leave(modules: dict[str, Any]) -> None:
    """Take our packages out of the way: a script may have a train.py of its own."""
    for name in [name for name in modules if name.partition(".")[0] in OURS]:
        del modules[name]
    sys.path[:] = [place for place in sys.path if not _is_code(place)]
    places = [place for place in os.environ.get("PYTHONPATH", "").split(":") if place]
    os.environ["PYTHONPATH"] = ":".join(place for place in places if not _is_code(place))


def _is_code(place: str) -> bool:
    return Path(place).resolve() == CODE.resolve()


def entry_point(name: str) -> importlib.metadata.EntryPoint:
    """Return the console command of that name.

    Raises:
        UserError: no package that is installed has one.
    """
    found = importlib.metadata.entry_points(group="console_scripts", name=name)
    if not found:
        raise UserError(f"command: {name}: no package here has a command of this name")
    return next(iter(found))


if __name__ == "__main__":
    try:
        exit_code = main(sys.argv[1:])
    except UserError as refused:
        print(f"error: {refused}", file=sys.stderr)
        exit_code = EXIT_BAD_INPUT
    # Not os._exit, as for ours: what a script left to be done at its exit is done.
    sys.exit(exit_code)
