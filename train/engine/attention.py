"""Attention of packed examples: each example of a row attends to itself alone.

Positions say where an example begins: they restart at 0. With them, transformers builds a mask of
(B, 1, T, T), which rules out the flash kernels. Here the examples are laid end to end instead and
attention is called for each of them: on a GPU in one call of torch's flash kernel for sequences of
different lengths, elsewhere one after the other.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from runfolder.errors import UserError

NAME = "sluice_packed"


def packed_inputs(model: PreTrainedModel, positions: torch.Tensor) -> dict[str, Any]:
    """Return the model's arguments for rows whose examples begin where `positions` (B, T) are 0."""
    arguments: dict[str, Any] = {"position_ids": positions}
    if model.config._attn_implementation == NAME:
        starts = torch.nonzero(positions.flatten() == 0).flatten().to(torch.int32)
        end = starts.new_tensor([positions.numel()])
        arguments["cu_seq_lens_q"] = torch.cat([starts, end])
    return arguments


@torch.no_grad()
def separate_examples(
    model: PreTrainedModel, sequence_length: int, tried: PreTrainedModel | None = None
) -> None:
    """Let the examples of a packed row attend to themselves alone; the model is on the CPU.

    Where an architecture has attention of another kind (windows, capped scores), transformers'
    mask does it. Either way, two packed examples must get the outputs that they get alone: from
    the model, or where all of its layers are alike (`is_plain`) from `tried`, one of its kind.

    Raises:
        UserError: they do not: the model has a state that passes from one to the next.
    """
    plain = model.config._attn_implementation
    tried = tried or model
    for implementation in [NAME] * is_plain(model, sequence_length) + [plain]:
        tried.set_attn_implementation(implementation)
        if _are_separate(tried, plain):
            model.set_attn_implementation(implementation)
            return
    kind = model.config.model_type
    raise UserError(
        f"data.packing: packed examples do not get what they get alone in a model of {kind}; "
        "use --data.packing false"
    )


def is_plain(model: PreTrainedModel, sequence_length: int) -> bool:
    """Return whether attention is causal and nothing else, in every layer."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    capped = getattr(config, "attn_logit_softcapping", None)
    return (
        model._supports_attention_backend
        and kinds == {"full_attention"}
        and (window is None or window >= sequence_length)
        and capped is None
    )


def _are_separate(model: PreTrainedModel, plain: str) -> bool:
    """Return whether two packed examples get what each gets alone, with the attention `plain`."""
    embedding: Any = model.get_input_embeddings()
    size = int(embedding.weight.shape[0])
    ids = torch.arange(12)[None] * 5 % max(1, size // 2) + size // 4
    examples = ids[:, :5], ids[:, 5:]
    positions = torch.cat([torch.arange(part.shape[1]) for part in examples])[None]
    try:
        packed = model(input_ids=ids, use_cache=False, **packed_inputs(model, positions)).logits
    except TypeError:  # an architecture that does not pass unknown arguments on
        return False
    packing = model.config._attn_implementation
    model.set_attn_implementation(plain)
    alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in examples], dim=1)
    model.set_attn_implementation(packing)
    return bool((packed - alone).abs().max() <= 1e-4 * alone.abs().max())


@torch.compiler.disable  # its shapes differ from step to step
def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of (B, H, T, D), as transformers calls it; returns (B, T, H, D).

    `cu_seq_lens_q` holds where each example begins in the B rows laid end to end, and their end.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    if torch.is_autocast_enabled(query.device.type):
        # As scaled_dot_product_attention does: rotated queries and keys are in fp32.
        kind = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    rows, heads, length, _ = query.shape
    # (B, H, T, D) -> (B T, H, D)
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    if _has_kernel(query) and not dropout:
        out = varlen_attn(
            *(query, key, value, cu_seq_lens_q, cu_seq_lens_q, length, length),
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=True,
        )
        assert isinstance(out, torch.Tensor)
    else:
        parts = []
        for first, last in pairwise(cu_seq_lens_q.tolist()):
            q, k, v = (part[first:last].transpose(0, 1)[None] for part in (query, key, value))
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
            )
            parts.append(out[0].transpose(0, 1))
        out = torch.cat(parts)
    return out.view(rows, length, heads, -1), None


def _has_kernel(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


AttentionInterface.register(NAME, _attend)
