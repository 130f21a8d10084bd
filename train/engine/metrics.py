"""What a run reports: metrics.jsonl, TensorBoard and the progress line; all by rank 0."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runfolder.files import write_atomically
from train.engine.story import say

# Dense bf16 peak in FLOP/s with fp32 accumulation, from the vendors' data sheets. The name that
# the driver gives must start with the key; the longest key that matches counts.
PEAK_FLOPS = {
    "NVIDIA A10": 125e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA RTX A6000": 154.8e12,
}
# Names that start like one above but are different chips.
OTHER_DEVICES = (
    "NVIDIA A10G",
    "NVIDIA A10M",
    "NVIDIA A100X",
    "NVIDIA H200 NVL",
    "NVIDIA L40",
    "NVIDIA L40G",
)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a device in FLOP/s, or None for an unknown one.

    There is no guess on purpose: wrong table entries have inflated published figures threefold.
    """
    known = [name for name in (*PEAK_FLOPS, *OTHER_DEVICES) if _is_chip(device_name, name)]
    return PEAK_FLOPS.get(max(known, key=len)) if known else None


def _is_chip(device_name: str, chip: str) -> bool:
    rest = device_name.removeprefix(chip)
    # A slice (MIG) has the whole GPU's name before its own.
    return rest != device_name and not rest[:1].isalnum() and " MIG " not in rest


class StepTimer:
    """Tokens per second of training steps only: evaluation and the first steps do not count."""

    def __init__(self, warmup_steps: int = 2) -> None:
        self._warmup_left = warmup_steps
        self._rates: list[float] = []
        self._window: list[tuple[float, float, float]] = []

    def add(self, *, tokens: float, seconds: float, data_seconds: float) -> None:
        """Count one step of `tokens` over all ranks."""
        if self._warmup_left > 0:
            self._warmup_left -= 1
            return
        self._window.append((tokens, seconds, data_seconds))
        self._rates.append(tokens / seconds)

    def take(self) -> dict[str, float]:
        """Return tokens_per_second and data_wait since the last call; nothing in the warm-up."""
        if not self._window:
            return {}
        tokens, seconds, waiting = (sum(column) for column in zip(*self._window, strict=True))
        self._window = []
        return {"tokens_per_second": tokens / seconds, "data_wait": waiting / seconds}

    def summary(self) -> dict[str, float]:
        """Return the median and the 10th and 90th percentile of the steps' rates, if measured."""
        if len(self._rates) < 2:
            return {}
        deciles = statistics.quantiles(self._rates, n=10, method="inclusive")
        return {
            "tokens_per_second_p10": deciles[0],
            "tokens_per_second_median": statistics.median(self._rates),
            "tokens_per_second_p90": deciles[8],
        }


class Metrics:
    """The record of a run, over all its attempts; no step is in it twice."""

    def __init__(self, folder: Path, *, max_steps: int, resume_step: int) -> None:
        """Open the record, without the lines from `resume_step` on: that step is written again."""
        # torch's own writer imports the whole of tensorboard; its event writer is enough.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._path = folder / "metrics.jsonl"
        if self._path.exists():
            _drop_from(self._path, resume_step)
        self._stream = self._path.open("a", encoding="utf-8")
        self._events = EventFileWriter(str(folder / "tensorboard"))
        if resume_step:
            restart = SessionLog(status=SessionLog.START)
            self._events.add_event(
                Event(step=resume_step, session_log=restart, wall_time=time.time())
            )
        interactive = os.environ.get("SLUICE_TERMINAL") == "1" or sys.stderr.isatty()
        self._bar = tqdm(
            total=max_steps, initial=resume_step, unit="step", disable=not interactive, ncols=100
        )

    def progress(self, step: int) -> None:
        """Move the progress bar, if there is one."""
        self._bar.update(step - self._bar.n)

    def write(self, line: dict[str, Any]) -> None:
        """Append one logged step to metrics.jsonl and TensorBoard, and show it."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        values = [
            Summary.Value(tag=key, simple_value=value)
            for key, value in line.items()
            if isinstance(value, float)
        ]
        event = Event(step=line["step"], summary=Summary(value=values), wall_time=time.time())
        self._events.add_event(event)
        shown = [f"{key} {_short(line[key])}" for key in _SHOWN if key in line]
        text = f"step {line['step']:>6}  " + "  ".join(shown)
        self._bar.write(text, file=sys.stdout) if not self._bar.disable else say(text)

    def close(self) -> None:
        """Flush what is buffered; the bar stays where it is."""
        self._bar.close()
        self._stream.close()
        self._events.close()


_SHOWN = (
    "loss",
    "validation_perplexity",
    "bits_per_byte",
    "validation_accuracy",
    "validation_macro_f1",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
)


def memory(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process in GiB: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    import resource

    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def _short(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _drop_from(path: Path, step: int) -> None:
    """Remove the lines of `step` and later: the run was ahead of its last checkpoint."""
    # An incomplete last line was being written when the attempt was killed.
    lines = [text for text in path.open(encoding="utf-8") if text.endswith("\n")]
    write_atomically(path, "".join(text for text in lines if json.loads(text)["step"] < step))
