"""How much memory the tensors of a process take at most, by strategy, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

# Numbers in a bucket of DeepSpeed's for gradients: a tenth of its own (docs/strategies.md).
BUCKET = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a training step of a model takes besides its weights and optimizer, in bytes."""

    num_parameters: int
    layer_parameters: int
    """Of the largest layer."""
    other_parameters: int
    """Outside of the layers: the embedding and the head."""
    forward: int
    """At most in the forward pass, at whose end the head has its gradient already."""
    backward: int
    """At most in the backward pass, with the gradients as they come."""
    backward_without_gradients: int
    """At most in the backward pass, if each gradient leaves when it is finished."""


def predict(found: Footprint, strategy: str, world_size: int, *, bf16: bool) -> int:
    """Return the most bytes that a process has in tensors, from the second step on.

    Everything in fp32: 4 bytes a parameter for its weight, 4 for its gradient, 8 for AdamW's
    moments, of which each strategy splits its own part; and what `strategy/` makes besides. With
    bf16, gradients are reduced in bf16 too. tests/real/train/test_fit.py compares it with runs.
    """
    total, forward = 4 * found.num_parameters, found.forward
    without = found.backward_without_gradients
    # Each process keeps its part of a gradient when it is finished; this is at least the peak.
    backward = without + (found.backward - without) / world_size
    part = total / world_size
    # One computes and the next is on its way.
    gathered = 2 * found.layer_parameters + found.other_parameters
    # DeepSpeed has a buffer for each precision in which gradients travel.
    bucket = min(BUCKET, found.num_parameters)
    buckets = bucket * (6 if bf16 else 4)
    if strategy == "ddp":
        if world_size == 1:
            return 3 * total + max(forward, found.backward)
        # All gradients have their place in DDP's buckets, always.
        return 4 * total + max(forward, without)
    if strategy in ("zero1", "zero2"):
        # What is sent in bf16 is a copy; the updated weights are gathered beside those in use.
        sending: float = buckets + (2 * bucket if bf16 else 0)
        updating = total + part
        return int(total + 3 * part + max(forward, sending + backward, updating))
    if strategy == "zero3":
        sending = bucket * (2 if bf16 else 4) * (1 + 1 / world_size)
        return int(5 * part + buckets + 4 * gathered + max(forward, without, sending))
    # fsdp2: what autocast casts is gathered in bf16 instead.
    cast, width = (total / 2, 2) if bf16 else (0, 4)
    return int(3 * part + width * gathered - cast + max(forward, backward))
