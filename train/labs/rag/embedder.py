"""Texts in, unit vectors out: an encoder with its tokenizer, for passages and questions."""

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
        """Move `model` (from encoders.load) to the device.

        `length` tokens of a text are read, special tokens included.
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
        # `corpus.stage` has checked this.
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
        # The encoder needs at least one token, even for a text of only control characters.
        rows = [ids or [0] for ids in rows]
        vectors = encoders.embed_all(self.model, rows, batch_size=len(rows), device=self.device)
        return indexes.unit(vectors.numpy())

    def count(self, text: str) -> int:
        """Return the tokens of a text, however long, without special tokens."""
        return len(self._counter.encode(text, add_special_tokens=False).ids)
