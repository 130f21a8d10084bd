"""Where a run resumes: at its newest complete checkpoint, or at step 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.engine import checkpoint, checkpoint_reader, models, source
from train.engine.checkpoint_reader import ReadState


@dataclass(frozen=True, kw_only=True)
class Start:
    """The start values of the loop, as they were when the checkpoint was made."""

    folder: Path | None = None
    """The checkpoint, or None for a new run."""
    step: int = 0
    """Optimizer steps taken so far."""
    position: int = 0
    """Sequences read so far."""
    line: dict[str, Any] = field(default_factory=lambda: {"step": 0})
    """The metrics of the step, which may not be logged yet."""
    state: dict[str, Any] = field(default_factory=dict)
    """All that the script saved."""
    optimizer: tuple[int, ReadState] | None = None
    """What `strategy.prepare` takes as `resume`."""
    weights: source.Source | None = None
    """Those of the checkpoint, if the model has none yet."""


def restore(
    checkpoints: checkpoint.Checkpoints, model: Any, must_match: Mapping[str, Any]
) -> Start:
    """Find the newest complete checkpoint, and return where the run resumes.

    A model that has weights gets those of the checkpoint now.

    `must_match` holds the values that the position in the data, or the weights, depend on.

    Raises:
        UserError: the checkpoint is from another model, or was made with other values than
            `must_match`.
    """
    newest = checkpoints.newest()
    if newest is None:
        return Start()
    models.check_same_shape(model, newest)
    state = checkpoint_reader.read_state(newest, must_match)
    is_hollow = any(p.is_meta for p in model.parameters())
    if not is_hollow:
        checkpoint_reader.load_weights(model, newest)
    return Start(
        folder=newest,
        step=state["step"],
        position=state["position"],
        line=state["line"],
        state=state,
        optimizer=(state["step"], checkpoint_reader.reader(newest)[0]),
        weights=source.of_checkpoint(newest) if is_hollow else None,
    )
