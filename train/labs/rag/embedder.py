"""Texts in, unit vectors out: an encoder with its tokenizer, for passages and questions alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.engine import encoders, tokenization
from train.labs.rag import indexes


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
        self._tokenizer = tokenization.load(tokenizer_folder).tokenizer
        self._counter = tokenization.load(tokenizer_folder).tokenizer
        pooling = encoders.pooling_of(model)
        self._query_prompt, self._document_prompt = pooling.query_prompt, pooling.document_prompt
        prompt_tokens = max(map(self.count, (self._query_prompt, self._document_prompt)))
        room = encoders.max_length(model, length + prompt_tokens)
        # As `corpus.stage` has seen to it.
        assert room == length + prompt_tokens or not prompt_tokens
        self._tokenizer.enable_truncation(room)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of passages, (B, D), float32, of length one; in one forward pass."""
        return self._embed([self._document_prompt + text for text in texts])

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of questions, as `documents` does those of passages."""
        return self._embed([self._query_prompt + text for text in texts])

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        # A text without a token, such as of control characters alone, is nothing to the encoder.
        rows = [ids or [0] for ids in rows]
        vectors = encoders.embed_all(self.model, rows, batch_size=len(rows), device=self.device)
        return indexes.unit(vectors.numpy())

    def count(self, text: str) -> int:
        """Return the tokens of a text, however long, without special tokens."""
        return len(self._counter.encode(text, add_special_tokens=False).ids)
