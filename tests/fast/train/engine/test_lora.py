"""LoRA: which layers there are, what an adapter is worth, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from train.engine import lora, models
from train.engine.lora import LoraSettings
from train.engine.presets import PRESETS


def adapted(base: Any, **settings: Any) -> Any:
    return lora.add_adapters(base, LoraSettings(**settings), seed=3, name="base", revision=None)


def targeted(found: Any) -> dict[str, int]:
    """Return the layers that peft gave an adapter, with the smaller side of each."""
    layers = {n.rpartition(".")[2]: m for n, m in found.named_modules() if hasattr(m, "base_layer")}
    return {name: min(layer.base_layer.weight.shape) for name, layer in layers.items()}


def test_the_layers_that_are_named_are_those_that_peft_finds(
    tied_model_folder: Path, tmp_path: Path
) -> None:
    # Its layers are no Linear, and their matrices lie the other way round.
    shape = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=1)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path)
    for folder in (tied_model_folder, tmp_path):
        assert lora.sides_of_folder(folder) == targeted(adapted(models.from_folder(folder)))


@pytest.mark.parametrize("preset", ["tiny", "tinyllama-1.1b"])
def test_a_presets_layers_are_known_without_its_weights(preset: str) -> None:
    with torch.device("meta"):
        found = adapted(LlamaForCausalLM(LlamaConfig(**vars(PRESETS[preset]))), rank=2)
        assert lora.sides_of_preset(preset) == targeted(found)


def test_an_adapter_begins_as_nothing_and_follows_from_the_seed(tied_model_folder: Path) -> None:
    tokens = torch.arange(16)[None]
    base = models.from_folder(tied_model_folder)
    expected = base(tokens).logits
    one, two = adapted(base), adapted(models.from_folder(tied_model_folder))
    assert torch.equal(one(tokens).logits, expected)
    weights = dict(two.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.requires_grad == ("lora_" in name)
        assert "lora_A" not in name or parameter.any()


def test_frozen_weights_cost_two_thirds(tied_model_folder: Path) -> None:
    base = models.from_folder(tied_model_folder)
    parameters, attention = base.num_parameters(), 12 * 2 * 32 * 16
    assert models.flops_per_token(base, 16) == 6 * parameters + attention
    found = adapted(base, rank=4)
    added = sum(p.numel() for p in found.parameters() if p.requires_grad)
    assert models.flops_per_token(found, 16) == 4 * parameters + 6 * added + attention


def test_recomputing_activations_does_not_change_the_adapters_gradients(
    tied_model_folder: Path,
) -> None:
    gradients = []
    for recompute in (False, True):
        base = models.from_folder(tied_model_folder)
        if recompute:
            base.activation_checkpointing_enable()
        found = adapted(base).train()
        found(torch.arange(16)[None]).logits.logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in found.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
    # All A are still (their B are zeros), every B moves.
    assert sum(bool(g.any()) for g in gradients[0]) == len(gradients[0]) // 2


def test_what_has_an_adapter_and_what_has_none_is_said(tied_model_folder: Path) -> None:
    shape = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    found = adapted(MixtralForCausalLM(shape), rank=2)
    assert lora.describe_adapted(found) == (
        "; adapters on experts.down_proj, experts.gate_up_proj, gate, "
        "k_proj, o_proj, q_proj, v_proj"
    )
    found = adapted(MixtralForCausalLM(shape), rank=2, target_modules="q_proj,v_proj")
    total = sum(p.numel() for p in found.parameters())
    left = 2 * (4 * 3 * 16 * 24 + 4 * 16 + 2 * 16 * 16)
    assert lora.describe_adapted(found) == (
        "; adapters on q_proj, v_proj; none on mlp.experts.down_proj, mlp.experts.gate_up_proj, "
        f"mlp.gate, self_attn.k_proj, self_attn.o_proj ({left / total:.0%} of all)"
    )
    assert "none on" not in lora.describe_adapted(adapted(models.from_folder(tied_model_folder)))
