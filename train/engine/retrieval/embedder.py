"""Texts in, unit vectors out: an encoder with its tokenizer, for passages and questions alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.engine import encoder, tokenizer
from train.engine.retrieval import index


class Embedder:
    """An encoder on its device."""

    def __init__(
        self, model: Any, tokenizer_folder: Path, length: int, device: torch.device
    ) -> None:
        """Take `model` (of encoder.load) to the device.

        Of a text `length` tokens are read, special tokens included.
        """
        self.model = model.to(device)
        self.device = device
        self.dimension: int = model.config.hidden_size
        self._tokenizer = tokenizer.load(tokenizer_folder).tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(encoder.max_length(model, length))
        self._counter = tokenizer.load(tokenizer_folder).tokenizer
        self._counter.no_truncation()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts, (B, D), float32, of length one; in one forward pass."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        # A text without a token, such as of control characters alone, is nothing to the encoder.
        rows = [ids or [0] for ids in rows]
        vectors = encoder.embed_all(self.model, rows, batch_size=len(rows), device=self.device)
        return index.unit(vectors.numpy())

    def count(self, text: str) -> int:
        """Return the tokens of a text, however long, without special tokens."""
        return len(self._counter.encode(text, add_special_tokens=False).ids)
