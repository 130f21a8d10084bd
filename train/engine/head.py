"""The loss where a language model's head is, with the logits of a few tokens at a time.

The logits of all tokens, (N, V), and their gradient are the largest tensors of a step: 1 GB for
2,048 tokens and a vocabulary of 32,000. Here a part of them is made, scored, turned into its
gradient and forgotten before the next, so that none is kept for the backward pass and nothing is
computed twice. The idea is Liger's (Hsu et al. 2024, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

# A part of the logits in fp32 has at most so many bytes: enough for fast matrix products.
PART_BYTES = 64 * 1024 * 1024
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
        of_weight = torch.zeros_like(weight) if wanted[1] else None
        of_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(1, PART_BYTES // (4 * weight.shape[0]))
        for states, labels, start in zip(
            hidden.split(size), targets.split(size), range(0, len(hidden), size), strict=True
        ):
            states = states.to(precision)
            loss, gradient = score(F.linear(states, matrix, shift), labels)
            total += loss
            if of_bias is not None:
                of_bias += gradient.sum(0)
            gradient = gradient.to(precision)
            if of_hidden is not None:
                of_hidden[start : start + size] = gradient @ matrix
            if of_weight is not None:
                if precision == of_weight.dtype:
                    of_weight.addmm_(gradient.t(), states)
                else:
                    of_weight += gradient.t() @ states
        ctx.gradients = of_hidden, of_weight, of_bias
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

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own  # type: ignore[method-assign]


@torch.no_grad()
def is_last(model: PreTrainedModel) -> bool:
    """Return whether a model's logits are what its head returns, by trying it; on the CPU.

    Some models cap or scale them after it (Gemma 2, Cohere, Granite): there the whole logits are
    needed.
    """
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    ids = torch.arange(4)[None] % head.weight.shape[0]
    mode = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        with scoring(head, ids, score):
            loss = model(input_ids=ids, use_cache=False).logits
    except Exception:  # whatever a model does with what its head returns
        return False
    finally:
        model.train(mode)
    expected, _ = score(logits[0], ids[0])
    return loss.shape == () and bool(torch.isclose(loss, expected, rtol=1e-5))
