"""Small models for the tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from train.engine import tokenization
from train.engine.data import SAMPLES, pieces


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
