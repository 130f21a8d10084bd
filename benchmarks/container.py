"""What the container costs: the start of a process in the image, and a whole dry run.

    python benchmarks/container.py

Both sides run `make`, in turns, so that other load on the machine affects both: on the host, in the
environment of this Python, and in the image. The files of the image and the environment have been
read before, so that no disk is measured.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the checkout is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import record
from runfolder.errors import UserError
from train.engine import arguments
from train.engine.errors import RunFailed, run_to_exit


@dataclass(kw_only=True)
class Config:
    """Measure what the container costs."""

    image: str = "images/sluice-cpu.sif"
    accel: str = "ddp"
    """The strategy of the dry run."""
    repeats: int = 5
    """How often each is measured; the median counts."""
    results: str = str(record.ROOT / "benchmarks" / "results")
    """Folder for the record."""


def main(argv: list[str]) -> int:
    """Run the benchmark; return its exit code."""
    started = time.monotonic()
    config = arguments.parse(Config, argv, prog="benchmarks/container.py", dry_run={})
    image = Path(config.image).absolute()
    if not image.is_file():
        raise UserError(f"image: {config.image} does not exist; make build-image VARIANT=cpu")
    check = ["containers/install-apptainer.sh", "--check"]
    apptainer = subprocess.run(check, cwd=record.ROOT, capture_output=True, text=True, check=False)
    if apptainer.returncode:
        raise UserError(apptainer.stderr.strip().removeprefix("error: "))
    command = [apptainer.stdout.strip(), "exec", *(["--userns"] if os.geteuid() == 0 else [])]
    inside = [*command, "--cleanenv", "--no-home", str(image)]
    with tempfile.TemporaryDirectory(prefix="sluice-benchmark-") as folder:
        cases = {
            "start": (lambda: _time(["true"]), lambda: _time([*inside, "true"])),
            "import torch": (
                lambda: _time([sys.executable, "-c", "import torch"]),
                lambda: _time([*inside, "python", "-c", "import torch"]),
            ),
            f"dry run, {config.accel}": (
                _dry_run(config.accel, "host", image, Path(folder)),
                _dry_run(config.accel, "apptainer", image, Path(folder)),
            ),
        }
        found = {name: compare(*actions, config.repeats) for name, actions in cases.items()}
    print(table(found), flush=True)
    content = {
        "benchmark": "cost of the container: apptainer exec beside the host",
        "circumstances": record.circumstances()
        | {"apptainer": _output([apptainer.stdout.strip(), "version"])},
        "workload": {"accel": config.accel, "repeats": config.repeats},
        "image_mb": round(image.stat().st_size / 1e6, 1),
        "cases": found,
        "seconds": round(time.monotonic() - started, 1),
    }
    path = record.save(Path(config.results), "container", content)
    print(f"\nrecord: {os.path.relpath(path)}", flush=True)
    return 0


def compare(host: Callable[[], float], image: Callable[[], float], repeats: int) -> dict[str, Any]:
    """Return the median seconds of both, measured in turns, after one that does not count."""
    seconds: dict[str, list[float]] = {"host": [], "image": []}
    for turn in range(repeats + 1):
        for name, action in (("host", host), ("image", image)):
            took = action()
            if turn:
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    spread = {name: [round(min(v), 3), round(max(v), 3)] for name, v in seconds.items()}
    return {
        "host_seconds": round(medians["host"], 3),
        "image_seconds": round(medians["image"], 3),
        "ratio": round(medians["image"] / medians["host"], 3),
        "difference_seconds": round(medians["image"] - medians["host"], 3),
        "least_and_most_seconds": spread,
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the figures as text for a terminal."""
    lines = [f"{'':<20}{'host':>10}{'image':>12}{'ratio':>9}{'difference':>13}"]
    lines += [
        f"{name:<20}{one['host_seconds']:>8.2f} s{one['image_seconds']:>10.2f} s"
        f"{one['ratio']:>9.2f}{one['difference_seconds']:>11.2f} s"
        for name, one in found.items()
    ]
    return "\n".join(lines)


def _dry_run(accel: str, runtime: str, image: Path, folder: Path) -> Callable[[], float]:
    make = ["make", "dry-run", f"ACCEL={accel}", f"RUNTIME={runtime}", f"IMAGE={image}"]
    # This Python's own environment, and temporary run folders.
    environment = {
        "VENV": str(Path(sys.prefix)),
        "SLUICE_RUNS": str(folder / "runs"),
        "SLUICE_DATASETS": str(folder / "datasets"),
        "SLUICE_CACHE": str(folder / "cache"),
    }
    return lambda: _time(make, environment)


def _time(command: list[str], environment: dict[str, str] | None = None) -> float:
    """Return the seconds that a command takes.

    Raises:
        RunFailed: it failed.
    """
    started = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=record.ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    took = time.perf_counter() - started
    if done.returncode:
        raise RunFailed(f"{' '.join(command[:3])} failed: {done.stderr.strip()[-500:]}")
    return took


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    run_to_exit(main)
