"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from train.engine.settings import ScheduleSettings


def lr_at(step: int, *, peak_lr: float, max_steps: int, schedule: ScheduleSettings) -> float:
    """Return the learning rate of optimizer step `step` (0 is the first).

    Linear warm-up to `peak_lr` over `warmup_steps`, then cosine (Loshchilov & Hutter 2017,
    arXiv:1608.03983, eq. 5, one cycle), linear, or constant; the last step has `min_lr_ratio`
    of the peak.
    """
    if step < schedule.warmup_steps:
        return peak_lr * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak_lr
    decay_steps = max(1, max_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / decay_steps)
    falling = (1 + math.cos(math.pi * progress)) / 2 if schedule.kind == "cosine" else 1 - progress
    return peak_lr * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * falling)
