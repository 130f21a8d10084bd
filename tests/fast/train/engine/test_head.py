"""The loss in parts, at the head: that of the whole logits, by transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from tests.models import of_family
from train.engine import head
from train.engine.loss import TokenLoss

CPU = torch.device("cpu")
# fp32 sums of some thousand terms, taken in another order.
SAME = 2e-6


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels of (3, 16), some without a target."""
    tokens = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    labels[0, 3:9] = -100
    labels[2] = -100
    return inputs, labels


def gradients(built: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in built.named_parameters() if p.grad is not None}
    built.zero_grad()
    return found


def by_hand(built: PreTrainedModel) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of `batch`, times 0.3, and its gradients, from the whole logits."""
    inputs, labels = batch()
    logits = built(input_ids=inputs).logits
    loss = 0.3 * F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    return float(loss.detach()), gradients(built)


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("gpt2", {"n_head": 4}),
    ("phi", {"pad_token_id": 0}),  # its head has a bias
    ("qwen3", {"head_dim": 8}),
    ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
]


@pytest.mark.parametrize("tokens_at_once", [1, 7, 48, 1000])
@pytest.mark.parametrize(("family", "more"), FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_logits(
    family: str, more: dict[str, Any], tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = of_family(family, **more)
    expected, expected_gradients = by_hand(built)
    monkeypatch.setattr(head, "PART_BYTES", 4 * 300 * tokens_at_once)
    token_loss = TokenLoss(built, CPU, bf16=False)
    assert not token_loss.whole_logits
    loss = 0.3 * token_loss(*batch())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=SAME)
    found = gradients(built)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=SAME)


def test_the_gradient_of_a_head_in_bf16_is_added_up_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One token at a time: a sum in bf16 would stop to grow at 256 times its term.
    monkeypatch.setattr(head, "PART_BYTES", 1)
    linear = torch.nn.Linear(2, 3, bias=True, dtype=torch.bfloat16)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    states = torch.ones(1, 1024, 2)
    targets = torch.zeros(1, 1024, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16), head.scoring(linear, targets, head.score):
        linear(states).backward()
    # softmax - one-hot is (-2/3, 1/3, 1/3) for each token.
    expected = torch.tensor([-2 / 3, 1 / 3, 1 / 3]) * 1024
    assert linear.weight.grad is not None and linear.bias.grad is not None
    torch.testing.assert_close(linear.bias.grad.float(), expected, rtol=0.01, atol=0)
    torch.testing.assert_close(
        linear.weight.grad.float(), expected.unsqueeze(1).expand(3, 2), rtol=0.01, atol=0
    )


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    token_loss = TokenLoss(of_family("llama"), CPU, bf16=False)
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.shape[-1] if tensor.ndim else 1)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_loss(*batch())
    assert sizes and 300 not in sizes


def test_a_frozen_head_gets_no_gradient_and_an_evaluation_none_at_all() -> None:
    built = of_family("llama")
    built.lm_head.weight.requires_grad_(False)
    _, expected = by_hand(built)
    token_loss = TokenLoss(built, CPU, bf16=False)
    (0.3 * token_loss(*batch())).backward()
    found = gradients(built)
    assert built.lm_head.weight.grad is None
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=SAME)
    with torch.no_grad():
        assert not token_loss(*batch()).requires_grad


def test_in_bf16_it_is_as_near_to_fp32_as_the_whole_logits() -> None:
    built = of_family("llama")
    expected, exact = by_hand(built)
    half = TokenLoss(built, CPU, bf16=True)
    errors = []
    for half.whole_logits in (False, True):
        loss = 0.3 * half(*batch())
        loss.backward()
        assert float(loss.detach()) == pytest.approx(expected, rel=5e-3)
        found = gradients(built)
        errors.append(sum(float((found[n] - exact[n]).norm()) for n in exact))
    in_parts, whole = errors
    assert in_parts < 1.1 * whole


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 3.0}),
    ],
)
def test_a_model_that_changes_its_logits_after_the_head_keeps_them_whole(
    family: str, more: dict[str, Any]
) -> None:
    built = of_family(family, **more)
    built.generation_config.eos_token_id = None
    expected, expected_gradients = by_hand(built)
    token_loss = TokenLoss(built, CPU, bf16=False)
    assert token_loss.whole_logits
    loss = 0.3 * token_loss(*batch())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=SAME)
    found = gradients(built)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=SAME)


def test_the_head_is_as_it_was_afterwards_whatever_happens() -> None:
    built = of_family("llama")
    plain = built.lm_head(torch.ones(1, 2, 32))
    token_loss = TokenLoss(built, CPU, bf16=False)
    inputs, labels = batch()
    with pytest.raises(IndexError):
        token_loss(inputs + 300, labels)
    assert torch.equal(built.lm_head(torch.ones(1, 2, 32)), plain)
    assert token_loss(inputs).shape == (3, 16, 300)
