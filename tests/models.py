"""Small models for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from train.engine import strategy, tokenization
from train.engine.data import SAMPLES, pieces
from train.engine.loss import TokenLoss
from train.engine.settings import OptimizerSettings
from train.engine.source import Source
from train.engine.strategy.base import Strategy

# Names that most families have for what makes a model small.
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}


def of_family(family: str, **more: Any) -> PreTrainedModel:
    """Return a small model of an architecture, such as "llama", always the same, in eval mode."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SHAPE, **more})
    built: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return built


def wrapped(
    model: PreTrainedModel,
    weights: Source | None,
    device: torch.device,
    *,
    bf16: bool = False,
    micro_batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    reduce_dtype: str = "auto",
) -> Strategy:
    """Return a model under the strategy of the environment; `weights`: if it has none yet."""
    return strategy.prepare(
        TokenLoss(model, device, bf16=bf16),
        OptimizerSettings(),
        name=strategy.name_from_environment(),
        device=device,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        resume=None,
        source=weights,
        reduce_dtype=reduce_dtype,
    )


def write_tied_model(folder: Path, **shape: int) -> Path:
    """Write a Llama of two layers with tied embeddings, and its tokenizer; return the folder."""
    torch.manual_seed(7)
    config = LlamaConfig(
        **shape,
        num_hidden_layers=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    text = pieces([SAMPLES / "train.txt"], text_column="text", join_rows=False)
    tokenization.train(text, config.vocab_size, folder, "the sample")
    return folder
