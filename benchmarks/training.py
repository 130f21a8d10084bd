"""How fast a step is on a CPU, beside a bare loop and the Hugging Face Trainer.

    python benchmarks/training.py

Each as its users start it: ours by `make run`, the peers (peer.py) by Python. In turns, ours first
and last in each round, so that what else the machine does affects all alike.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the checkout is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import corpus, record
from train.engine import arguments
from train.engine.errors import RunFailed, run_to_exit

# What slurm/environment.sh sets for glibc.
ALLOCATOR = re.compile(r"^ *export (MALLOC_[A-Z_]+)=\$\{\1:-(\d+)\}$", re.MULTILINE)


@dataclass(kw_only=True)
class Config:
    """Measure how fast training is on this machine's CPUs."""

    preset: str = "15m"
    sequence_length: int = 256
    micro_batch_size: int = 8
    steps: int = 8
    """Timed steps of each process, after two that do not count."""
    rounds: int = 2
    precisions: str = "bf16 fp32"
    results: str = str(record.ROOT / "benchmarks" / "results")
    """Folder for the record."""


def main(argv: list[str]) -> int:
    """Run the benchmark; return its exit code."""
    started = time.monotonic()
    config = arguments.parse(Config, argv, prog="benchmarks/training.py", dry_run={})
    allocator = dict(ALLOCATOR.findall((record.ROOT / "slurm/environment.sh").read_text()))
    cases = {
        "bare loop": ("bare", {}),
        "Trainer": ("trainer", {}),
        "bare loop, our allocator settings": ("bare", allocator),
        "Trainer, our allocator settings": ("trainer", allocator),
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="sluice-benchmark-") as folder:
        scratch = Path(folder)
        for name, seed in (("train", 1), ("validation", 2)):
            words = corpus.vocabulary(0)
            corpus.write_corpus(scratch / f"{name}.txt", 2_000_000, words, seed)
        # What is staged is staged once.
        _ours(config, "fp32", scratch)
        for precision in config.precisions.split():
            rates: dict[str, list[float]] = {name: [] for name in ["ours", *cases]}
            for _ in range(config.rounds):
                rates["ours"].append(_ours(config, precision, scratch))
                for name, (kind, variables) in cases.items():
                    rates[name].append(_peer(config, kind, precision, variables))
                rates["ours"].append(_ours(config, precision, scratch))
            found[precision] = _summary(rates)
            print(_table(precision, found[precision]), flush=True)
    content = {
        "benchmark": "training steps on a CPU beside a bare loop and the Hugging Face Trainer",
        "circumstances": record.circumstances(),
        "workload": {k: v for k, v in vars(config).items() if k != "results"},
        "tokens_per_second": found,
        "seconds": round(time.monotonic() - started, 1),
    }
    path = record.save(Path(config.results), "training-cpu", content)
    print(f"\nrecord: {os.path.relpath(path)}", flush=True)
    return 0


def _summary(rates: dict[str, list[float]]) -> dict[str, Any]:
    ours = statistics.median(rates["ours"])
    return {
        name: {
            "median": round(statistics.median(values), 1),
            "least_and_most": [round(min(values), 1), round(max(values), 1)],
            "ours_to_it": round(ours / statistics.median(values), 3),
        }
        for name, values in rates.items()
    }


def _table(precision: str, found: dict[str, Any]) -> str:
    """Return the figures as text for a terminal."""
    lines = [
        f"{precision + ', tokens/s':<36}{'median':>9}{'least':>9}{'most':>9}{'ours to it':>13}"
    ]
    for name, one in found.items():
        least, most = one["least_and_most"]
        lines.append(
            f"{name:<36}{one['median']:>9.0f}{least:>9.0f}{most:>9.0f}{one['ours_to_it']:>13.2f}"
        )
    return "\n".join(lines)


def _ours(config: Config, precision: str, scratch: Path) -> float:
    """Return the rate of `make run`."""
    words = {
        "model.preset": config.preset,
        "data.train": scratch / "train.txt",
        "data.validation": scratch / "validation.txt",
        "data.sequence_length": config.sequence_length,
        "batch.global_batch_size": config.micro_batch_size,
        "batch.micro_batch_size": config.micro_batch_size,
        "evaluation.max_tokens": 1,
        "max_steps": 2 + config.steps,
        "precision": precision,
    }
    own = {"SLUICE_RUNS": str(scratch / "runs"), "SLUICE_DATASETS": str(scratch / "datasets")}
    settings = " ".join(f"--{name} {value}" for name, value in words.items())
    _run(["make", "run", "RUNTIME=host", "NPROC=1", f"VENV={sys.prefix}", f"ARGS={settings}"], own)
    newest = max(
        (scratch / "runs/tinyllama").glob("*/attempts/*/outcome.json"), key=os.path.getmtime
    )
    return float(json.loads(newest.read_text())["tokens_per_second_median"])


def _peer(config: Config, kind: str, precision: str, variables: dict[str, str]) -> float:
    sizes = (config.preset, config.steps, config.micro_batch_size, config.sequence_length)
    words = [sys.executable, "-m", "benchmarks.peer", kind, precision, *map(str, sizes)]
    return float(json.loads(_run(words, variables).splitlines()[-1])["tokens_per_second"])


def _run(command: list[str], variables: dict[str, str]) -> str:
    environment = os.environ | variables
    done = subprocess.run(
        command, cwd=record.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunFailed(f"{command[:4]}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


if __name__ == "__main__":
    run_to_exit(main)
