"""Where a run goes on: at its newest whole checkpoint, or at step 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.engine import checkpoint, checkpoint_reader, models
from train.engine.strategy.base import ReadState


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the loop begins with; all of it as it was when the checkpoint was made."""

    folder: Path | None = None
    """The checkpoint, or None for a run that begins."""
    step: int = 0
    """Optimizer steps that were taken."""
    position: int = 0
    """Sequences that were read."""
    line: dict[str, Any] = field(default_factory=lambda: {"step": 0})
    """The metrics of the step, which may not be logged yet."""
    state: dict[str, Any] = field(default_factory=dict)
    """All that the script saved."""
    optimizer: tuple[int, ReadState] | None = None
    """What `strategy.prepare` takes as `resume`."""


def restore(
    checkpoints: checkpoint.Checkpoints, model: Any, must_match: Mapping[str, Any]
) -> Start:
    """Put the newest whole checkpoint's weights into `model`, and say where the run goes on.

    `must_match` is what the position in the data, or the weights, would mean nothing without.

    Raises:
        UserError: the checkpoint is of another model, or was made with something else than
            `must_match` says.
    """
    newest = checkpoints.newest()
    if newest is None:
        return Start()
    models.check_same_shape(model, newest)
    state = checkpoint_reader.read_state(newest, must_match)
    checkpoint_reader.load_weights(model, newest)
    return Start(
        folder=newest,
        step=state["step"],
        position=state["position"],
        line=state["line"],
        state=state,
        optimizer=(state["step"], checkpoint_reader.reader(newest)[0]),
    )
