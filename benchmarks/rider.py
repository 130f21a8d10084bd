"""What the rider costs a training script: for each optimizer step, and at the start.

    python benchmarks/rider.py

The same steps are taken with and without it, in turns in one process, and empty scripts are started
with and without it. Ratios are of medians.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the checkout is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from benchmarks import record
from train.rider import Rider

# A step of 5 M parameters takes some milliseconds here: little, compared with any real one.
WIDTH = 1600
STEPS, ROUNDS, STARTS = 40, 12, 15


def step_seconds(rider: Rider | None) -> list[float]:
    """Return what each of some training steps takes, with the hooks of `rider` or without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = torch.randn(16, WIDTH)
    hooks = []
    if rider is not None:
        hooks.append(register_optimizer_step_pre_hook(rider.before_step))
        hooks.append(register_optimizer_step_post_hook(rider.after_step))
    found = []
    for _ in range(STEPS):
        began = time.perf_counter()
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.perf_counter() - began)
    for hook in hooks:
        hook.remove()
    # The first makes the optimizer's state.
    return found[1:]


def hook_seconds(rider: Rider, count: int = 100_000) -> float:
    """Return what the two hooks themselves take, for a step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    rider.after_step(optimizer)
    began = time.perf_counter()
    for _ in range(count):
        rider.before_step(optimizer)
        rider.after_step(optimizer)
    return (time.perf_counter() - began) / count


def start_seconds(command: list[str]) -> float:
    """Return what it takes to start an empty script and to see it end."""
    environment = os.environ | {"PYTHONPATH": str(record.ROOT)}
    began = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Measure, print and record."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        with_rider: list[float] = []
        without: list[float] = []
        for _ in range(ROUNDS):
            without += step_seconds(None)
            with_rider += step_seconds(Rider(Path(scratch)))
        hooks_s = hook_seconds(Rider(None))
        # A module of Python's own that prints a line.
        ridden = [sys.executable, "-m", "train.rider", "__hello__"]
        alone = [sys.executable, "-m", "__hello__"]
        starts: dict[str, list[float]] = {"plain": [], "with the rider": []}
        start_seconds(ridden)
        for _ in range(STARTS):
            starts["plain"].append(start_seconds(alone))
            starts["with the rider"].append(start_seconds(ridden))
    step, step_with = statistics.median(without), statistics.median(with_rider)
    start, start_with = (statistics.median(starts[key]) for key in ("plain", "with the rider"))
    found: dict[str, Any] = {
        "benchmark": "the rider's cost",
        "circumstances": record.circumstances(),
        "hooks_us_per_step": round(1e6 * hooks_s, 2),
        "step_ms": {"without": round(1e3 * step, 3), "with": round(1e3 * step_with, 3)},
        "step_ratio": round(step_with / step, 4),
        "start_ms": {"without": round(1e3 * start, 1), "with": round(1e3 * start_with, 1)},
    }
    path = record.save(record.ROOT / "benchmarks/results", "rider", found)
    print(f"the hooks take {found['hooks_us_per_step']} microseconds for a step")
    print(f"a step of {1e3 * step:.2f} ms: ratio with to without {found['step_ratio']}")
    print(f"a start: {1e3 * start:.0f} ms without, {1e3 * start_with:.0f} ms with")
    print(f"record: {path.relative_to(record.ROOT)}")


if __name__ == "__main__":
    main()
