"""How far a run got, and what it still needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runfolder import heartbeats, records
from runfolder.attempts import Attempt
from runfolder.checkpoints import newest_step
from runfolder.files import json_object, last_lines, number


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run got; None is unknown."""

    step: int | None
    max_steps: int | None
    tokens_per_second: float | None
    seconds_per_step: float | None

    @property
    def needed_s(self) -> float | None:
        """Seconds that the remaining steps take at the last speed, without saves and evaluation."""
        if self.step is None or self.max_steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.max_steps - self.step) * self.seconds_per_step


def read_progress(folder: Path, newest: Attempt | None) -> Progress:
    """Return how far the run got, by its newest logged step, checkpoint or outcome.

    Of a script that is not ours: the steps of its newest attempt, which it may have counted on.
    """
    if records.program(folder) is not None:
        beat = heartbeats.read(newest.folder) if newest is not None else {}
        return Progress(
            step=number(beat.get("steps")),
            max_steps=None,
            tokens_per_second=None,
            seconds_per_step=_positive(beat.get("seconds_per_step")),
        )
    logged = [json_object(line) for line in last_lines(folder / "metrics.jsonl")]
    lines = [line for line in logged if number(line.get("step")) is not None]
    told = [newest_step(folder)]
    if newest is not None:
        told += [number((newest.slurm or {}).get("step"))]
        told += [number((newest.outcome or {}).get("step"))]
    told += [line["step"] for line in lines[-1:]]
    steps = [step for step in told if step is not None]
    began = (folder / "metrics.jsonl").exists()
    return Progress(
        step=max(steps, default=None if began else 0),
        max_steps=_max_steps(folder),
        tokens_per_second=_speed(lines, "tokens"),
        seconds_per_step=_seconds_per_step(lines),
    )


def _speed(lines: list[dict[str, Any]], unit: str) -> float | None:
    speeds = (_positive(line.get(f"{unit}_per_second")) for line in reversed(lines))
    return next((speed for speed in speeds if speed), None)


def _seconds_per_step(lines: list[dict[str, Any]]) -> float | None:
    """Return the seconds per step: a batch, in the unit that the script counts, over the speed."""
    for unit in ("tokens", "rows"):
        batch, speed = _batch(lines, unit), _speed(lines, unit)
        if batch and speed:
            return batch / speed
    return None


def _batch(lines: list[dict[str, Any]], unit: str) -> float | None:
    """Return the size of a batch, from the last two lines, as it may differ between attempts."""
    known = [(line["step"], _positive(line.get(unit))) for line in lines]
    counted = [(step, tokens) for step, tokens in known if tokens is not None]
    (step, tokens), (before, tokens_before) = (*reversed(counted), (0, 0.0), (0, 0.0))[:2]
    return _positive((tokens - tokens_before) / (step - before)) if step > before else None


def _max_steps(folder: Path) -> int | None:
    import yaml

    try:
        config = (folder / "config.yaml").read_text(encoding="utf-8")
        # Every value as text: an odd one elsewhere in the file does not matter here.
        content = yaml.load(config, Loader=yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    value = content.get("max_steps") if isinstance(content, dict) else None
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value) else None


def _positive(value: object) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e18:
        return float(value)
    return None
