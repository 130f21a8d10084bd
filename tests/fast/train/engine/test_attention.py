"""Packed examples see themselves alone, whatever the architecture, or are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from runfolder.errors import UserError
from tests.models import of_family
from train.engine import attention
from train.engine.attention import NAME, packed_inputs, separate_examples
from train.engine.loss import TokenLoss

CPU = torch.device("cpu")


def packed(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and positions of a row of examples with these lengths."""
    ids = torch.randint(0, 300, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


# What attends: our own where attention is causal and nothing else, transformers' mask elsewhere.
FAMILIES: list[tuple[str, dict[str, Any], int, str]] = [
    ("llama", {}, 32, NAME),
    ("qwen2", {}, 32, NAME),
    ("qwen3", {"head_dim": 8}, 32, NAME),
    ("mistral", {"sliding_window": 32}, 32, NAME),
    ("mistral", {"sliding_window": 8}, 32, "sdpa"),
    ("gpt2", {"n_head": 4}, 32, NAME),
    ("phi3", {"pad_token_id": 0}, 32, NAME),
    ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}, 32, "eager"),
    ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}, 32, "sdpa"),
    ("stablelm", {}, 32, "sdpa"),
]


@pytest.mark.parametrize(("family", "more", "length", "implementation"), FAMILIES)
def test_each_example_has_the_loss_that_it_has_alone(
    family: str, more: dict[str, Any], length: int, implementation: str
) -> None:
    built = of_family(family, **more)
    alone = TokenLoss(copy.deepcopy(built), CPU, bf16=False)
    separate_examples(built, length)
    assert built.config._attn_implementation == implementation
    together = TokenLoss(built, CPU, bf16=False)
    # Longer than a window, so that it counts.
    lengths = (13, 1, 18)
    ids, positions = packed(*lengths)
    labels = ids.roll(-1, dims=1)
    first = 0
    for size in lengths:
        own = torch.full_like(labels, -100)
        own[:, first : first + size] = labels[:, first : first + size]
        expected = alone(ids[:, first : first + size], labels[:, first : first + size])
        found = together(ids, own, positions)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        first += size


def test_changing_an_example_changes_no_other_loss_or_gradient() -> None:
    built = of_family("llama")
    separate_examples(built, 32)
    loss = TokenLoss(built, CPU, bf16=False)
    ids, positions = packed(10, 12, 10)
    ids, positions = ids.repeat(2, 1), positions.repeat(2, 1)
    labels = torch.full_like(ids, -100)
    labels[:, 10:22] = ids[:, 11:23]

    def of(tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
        built.zero_grad()
        value = loss(tokens, labels, positions)
        value.backward()
        (first, *_) = built.parameters()
        assert first.grad is not None
        return value.item(), first.grad.clone()

    value, gradient = of(ids)
    changed = ids.clone()
    changed[:, :10] = (ids[:, :10] + 1) % 300
    changed[:, 23:] = (ids[:, 23:] + 1) % 300
    again, gradient_again = of(changed)
    assert value == again
    assert torch.equal(gradient, gradient_again)
    # And a test that can fail: without positions, it does see what is before it.
    assert loss(ids, labels).item() != loss(changed, labels).item()


def test_gradient_checkpointing_keeps_examples_apart() -> None:
    results = []
    for checkpointing in (False, True):
        built = of_family("llama")
        separate_examples(built, 32)
        if checkpointing:
            built.activation_checkpointing_enable()
        built.train()
        ids, positions = packed(10, 22)
        TokenLoss(built, CPU, bf16=False)(ids, ids.roll(-1, dims=1), positions).backward()
        results.append(
            torch.cat([p.grad.flatten() for p in built.parameters() if p.grad is not None])
        )
    assert torch.allclose(*results, atol=1e-6)


def test_autocast_attends_in_bf16() -> None:
    built = of_family("llama")
    separate_examples(built, 32)
    half = TokenLoss(built, CPU, bf16=True)
    whole = TokenLoss(built, CPU, bf16=False)
    ids, positions = packed(10, 22)
    labels = ids.roll(-1, dims=1)
    found, expected = (loss(ids, labels, positions).item() for loss in (half, whole))
    assert found != expected
    assert found == pytest.approx(expected, rel=1e-2)


def test_a_state_that_passes_on_is_refused() -> None:
    state = of_family("mamba", state_size=8, num_hidden_layers=2)
    with pytest.raises(UserError, match=r"in a model of mamba; use --data.packing false"):
        separate_examples(state, 32)
    # By distances, which transformers computes over the whole row.
    with pytest.raises(UserError, match=r"in a model of bloom; use --data.packing false"):
        separate_examples(of_family("bloom", n_head=4), 32)


def test_the_gpu_kernel_is_called_with_the_examples_of_all_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel needs a GPU: a stand-in of the same signature computes what it documents."""
    calls = []

    def varlen(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        calls.append(
            (cu_seq_q.tolist(), cu_seq_k.tolist(), max_q, max_k, window_size, cu_seq_q.dtype)
        )
        parts = []
        for first, last in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
            q, k, v = (part[first:last].transpose(0, 1) for part in (query, key, value))
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
            )
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(attention, "_has_kernel", lambda query: True)
    built = of_family("llama")
    separate_examples(built, 32)
    ids, positions = packed(10, 22)
    ids, positions = ids.repeat(2, 1), positions.repeat(2, 1)
    calls.clear()
    found = built(input_ids=ids, use_cache=False, **packed_inputs(built, positions)).logits
    assert calls == [([0, 10, 32, 42, 64],) * 2 + (32, 32, (-1, 0), torch.int32)] * 2
    monkeypatch.setattr(attention, "_has_kernel", lambda query: False)
    expected = built(input_ids=ids, use_cache=False, **packed_inputs(built, positions)).logits
    assert torch.allclose(found, expected, atol=1e-5)
