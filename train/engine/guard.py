"""What ends a run in one line: a loss that is not finite, a lost peer, memory that is used up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from train.engine.distributed import gather_strings, rank
from train.engine.errors import RunFailed

# Phrases for the same error from torch, cuBLAS, Inductor and the C library.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "ALLOC_FAILED")


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
def in_one_line() -> Iterator[None]:
    """Turn what a user can do something about into one line: a failed collective, no memory."""
    try:
        yield
    except RunFailed:
        raise
    except (RuntimeError, MemoryError) as error:
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        if is_out_of_memory(error):
            raise RunFailed(
                f"rank {rank()}: out of memory ({reason}); let it hold less: a smaller "
                "--batch.micro_batch_size, --model.gradient_checkpointing true, ACCEL=fsdp2 or "
                "ACCEL=zero3, more processes; on a cluster, `make submit PLAN=1` says what fits"
            ) from None
        marks = ("gloo", "NCCL", "Connection closed", "Connection reset")
        if not any(mark in str(error) for mark in marks):
            raise
        # The rank that caused it has printed the reason.
        raise RunFailed(f"rank {rank()}: lost contact with another process ({reason})") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device or the process ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words.lower() in str(error).lower() for words in OUT_OF_MEMORY)


def _span(positions: list[list[int]]) -> str:
    return f"{positions[0][0]} to {positions[-1][-1]}"
