"""Checks that end a run before it does harm: a loss that is not finite, a lost peer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from train.engine.distributed import gather_strings, rank
from train.engine.errors import RunFailed


def check_loss(
    local_loss: float, global_loss: float, *, step: int, positions: list[list[int]]
) -> None:
    """Raise `RunFailed` if any rank's loss of this step is not finite; before the optimizer step.

    `positions` are the data positions of this rank's micro batches.
    """
    if math.isfinite(global_loss):
        return
    mine = "" if math.isfinite(local_loss) else f"rank {rank()}, positions {_span(positions)}"
    guilty = [text for text in gather_strings(mine) if text] or ["the sum over ranks"]
    raise RunFailed(
        f"the loss of step {step} is not finite ({'; '.join(guilty)}); the last checkpoint is from "
        "before it: resume with a smaller optimizer.lr, or check the text at these positions"
    )


def check_gradient(norm: float, *, step: int, positions: list[list[int]]) -> None:
    """Raise `RunFailed` if the gradient norm of this step is not finite; nothing was updated."""
    if math.isfinite(norm):
        return
    everywhere = gather_strings(f"rank {rank()}, positions {_span(positions)}")
    raise RunFailed(
        f"the gradient of step {step} is not finite ({'; '.join(everywhere)}); the last checkpoint "
        "is from before it: resume with a smaller optimizer.lr, or check the text at these "
        "positions"
    )


@contextmanager
def lost_peers() -> Iterator[None]:
    """Turn a failed collective into one line: the rank that caused it has printed the reason."""
    try:
        yield
    except RunFailed:
        raise
    except RuntimeError as error:
        text = str(error)
        if not any(
            mark in text for mark in ("gloo", "NCCL", "Connection closed", "Connection reset")
        ):
            raise
        reason = text.splitlines()[0]
        raise RunFailed(f"rank {rank()}: lost contact with another process ({reason})") from None


def _span(positions: list[list[int]]) -> str:
    return f"{positions[0][0]} to {positions[-1][-1]}"
