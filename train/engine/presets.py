"""Model shapes for random weights: named presets of Llama, and the encoder of a dry run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The fields of `transformers.LlamaConfig` that determine a model's size."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool


PRESETS = {
    # For tests and dry runs.
    "tiny": Preset(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    ),
    # The two sizes of the TinyStories models of llama2.c: what a laptop can train.
    "15m": Preset(
        vocab_size=32_000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    ),
    "110m": Preset(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ),
    # The config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0.
    "tinyllama-1.1b": Preset(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    ),
}

# The encoder that replaces a pretrained one in a dry run.
TINY_ENCODER_LAYERS = 2
TINY_ENCODER_POSITIONS = 256
