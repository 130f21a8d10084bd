"""The loss where a language model's head is, with the logits of a few tokens at a time.

The logits of all tokens, (N, V), and their gradient are the largest tensors of a step: 1 GB for
2,048 tokens and a vocabulary of 32,000. Here a part of them is made, scored, turned into its
gradient and forgotten before the next, so that none is kept for the backward pass and nothing is
computed twice. The idea is Liger's (Hsu et al. 2024, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

# A part of the logits has at most so many bytes: enough for fast matrix products.
PART_BYTES = 32 * 1024 * 1024
# On a CPU, a part is scored in blocks whose rows in fp32 stay in a core's cache.
BLOCK_BYTES = 4 * 1024 * 1024
IGNORED = -100
# Returns the summed loss of logits (n, V) at targets (n,), and its gradient (n, V).
Score = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy in nats, summed over targets that are not -100, and its gradient.

    Logits (n, V) of any precision and targets (n,); both results are in fp32. The gradient is
    softmax - one-hot.
    """
    chosen = F.log_softmax(logits.float(), dim=-1)
    counts = (targets != IGNORED).unsqueeze(1)
    places = targets.clamp(min=0).unsqueeze(1)
    total = -torch.where(counts, chosen.gather(1, places), 0.0).sum()
    gradient = chosen.exp_().scatter_add_(1, places, -counts.to(chosen.dtype))
    return total, gradient.mul_(counts)


class _HeadLoss(torch.autograd.Function):
    """The loss of hidden states (N, D) under a head's weight (V, D) and bias (V,), in parts."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        score: Score,
    ) -> torch.Tensor:
        kind = hidden.device.type
        precision = (
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        )
        matrix = weight.to(precision)
        shift = None if bias is None else bias.to(precision)
        wanted = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        # Added up in fp32, whatever the weight has: FSDP2 gathers it in bf16.
        wide = torch.promote_types(weight.dtype, torch.float32)
        of_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(1, PART_BYTES // (weight.shape[0] * precision.itemsize))
        rows = size if kind == "cuda" else max(1, BLOCK_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(hidden), size):
            states = hidden[start : start + size].to(precision)
            labels = targets[start : start + size]
            logits = F.linear(states, matrix, shift)
            for block, some in zip(logits.split(rows), labels.split(rows), strict=True):
                loss, gradient = score(block, some)
                total += loss
                block.copy_(gradient)
            # From here on, what it holds is its own gradient.
            gradient = logits
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=wide)
            if of_hidden is not None:
                of_hidden[start : start + size] = gradient @ matrix
            if of_weight is not None:
                if precision == wide:
                    of_weight.addmm_(gradient.t(), states)
                else:
                    of_weight += gradient.t() @ states
        ctx.gradients = (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None or bias is None else of_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> Any:  # type: ignore[override]
        parts = ctx.gradients
        del ctx.gradients
        return *(None if part is None else part.mul_(scale) for part in parts), None, None


@contextmanager
def scoring(head: nn.Linear, targets: torch.Tensor, score: Score) -> Iterator[None]:
    """Let a head return the summed loss of its inputs (B, T, D) at targets (B, T).

    What wraps a model (FSDP2, ZeRO-3) has the head's weights where the head is called, and only
    there; so it is the head that is called, within the model.
    """
    own = vars(head).get("forward")

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        states = hidden.reshape(-1, hidden.shape[-1])
        loss: torch.Tensor = _HeadLoss.apply(
            states, head.weight, head.bias, targets.flatten(), score
        )
        return loss

    head.forward = forward  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own  # type: ignore[method-assign]


@torch.no_grad()
def is_last(model: PreTrainedModel) -> bool:
    """Return whether a model's logits are what its head returns, by trying it; also without values.

    Some models cap or scale them after it (Gemma 2, Cohere, Granite): there the whole logits are
    needed.
    """
    if any(p.is_meta for p in model.parameters()):
        # Some move a table of theirs to where the ids are.
        model = copy.deepcopy(model)
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    device = head.weight.device
    ids = torch.zeros(1, 4, dtype=torch.int64, device=device)
    # Without values, transformers cannot look at ids to make a mask; it takes a made one as it is.
    made = [{"attention_mask": torch.zeros(1, 1, 4, 4, device=device)}] * head.weight.is_meta
    for mask in [*made, {}]:
        returned: list[torch.Tensor] = []
        hook = head.register_forward_hook(lambda _module, _inputs, found: returned.append(found))  # noqa: B023
        try:
            logits = model(input_ids=ids, use_cache=False, **mask).logits
        except Exception:  # whatever a model needs beside ids, or values
            continue
        finally:
            hook.remove()
        return len(returned) == 1 and logits is returned[0]
    return False
