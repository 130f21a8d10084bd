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


@dataclass(frozen=True)
class Held:
    """What a process holds under a strategy besides a step's own tensors, in bytes."""

    lasting: float
    """Between steps: weights, AdamW's moments, buffers; under ddp also the gradients' places."""
    accumulated: float
    """Gradients of the micro batches before the last."""
    share: float
    """The part of a gradient that stays when it is finished, with a single micro batch."""


def held(num_parameters: int, strategy: str, world_size: int, *, bf16: bool) -> Held:
    """Return what a process holds: in fp32, 4 bytes for a weight or gradient, 8 for its moments.

    What the libraries make besides was found by counting; tests/real/train/test_fit.py compares.
    """
    total = 4 * num_parameters
    part = total / world_size
    if strategy == "ddp":
        # The gradients have their places in buckets, always, but are not there before the last.
        alone = world_size == 1
        return Held(3 * total if alone else 4 * total, total, float(alone))
    if strategy in ("zero1", "zero2"):
        return Held(total + 3 * part, total if strategy == "zero1" else part, 1 / world_size)
    if strategy == "zero3":
        # The gradients of its part have a place, and DeepSpeed has the weights twice.
        return Held(5 * part + _buckets(num_parameters, bf16), 0, 0)
    return Held(3 * part, total, 1 / world_size)


def gathered(strategy: str, layer: int, other: int, *, bf16: bool) -> int:
    """Return the bytes of weights that are whole while they are needed.

    A layer computes and the next is on its way, beside what is outside of the layers. DeepSpeed
    has it in fp32, also what was sent in bf16.
    """
    width = {"zero3": 4, "fsdp2": 2 if bf16 else 4}.get(strategy, 0)
    return width * (2 * layer + other)


def predict(
    found: Footprint, strategy: str, world_size: int, *, bf16: bool, accumulates: bool
) -> int:
    """Return the most bytes that a process has in tensors, from the second step on.

    `accumulates`: a step has several micro batches. With bf16, gradients are reduced in bf16 too.
    """
    own = held(found.num_parameters, strategy, world_size, bf16=bf16)
    total = 4 * found.num_parameters
    without = found.backward_without_gradients
    forward, backward = float(found.forward), without + own.share * (found.backward - without)
    if accumulates:
        forward, backward = forward + own.accumulated, without + own.accumulated
    bucket = min(BUCKET, found.num_parameters)
    peaks = [forward, backward]
    if strategy in ("zero1", "zero2"):
        # What is sent in bf16 is a copy; the updated weights are gathered beside those in use.
        sending = _buckets(found.num_parameters, bf16) + (2 * bucket if bf16 else 0)
        peaks = [forward, backward + sending, total + total / world_size]
    elif strategy == "zero3":
        peaks.append(bucket * (2 if bf16 else 4) * (1 + 1 / world_size))
    # What autocast casts is gathered in bf16 instead.
    cast = total / 2 if strategy == "fsdp2" and bf16 else 0
    whole = gathered(strategy, found.layer_parameters, found.other_parameters, bf16=bf16)
    return int(own.lasting + max(peaks) + whole - cast)


def _buckets(num_parameters: int, bf16: bool) -> int:
    """Return the bytes of DeepSpeed's buffers: one for each precision in which gradients travel."""
    return min(BUCKET, num_parameters) * (6 if bf16 else 4)
