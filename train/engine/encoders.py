"""An encoder: texts in, one vector for each out, pooled as its folder says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from runfolder.errors import UserError
from train.engine import models, pooling, tokenization
from train.engine.presets import TINY_ENCODER_LAYERS, TINY_ENCODER_POSITIONS
from train.engine.pretrained import ENCODER


def load(folder: Path | None, tokenizer_folder: Path, seed: int) -> PreTrainedModel:
    """Return the encoder of a model folder, or a small one with random weights; fp32, on the CPU.

    Raises:
        UserError: the folder holds no encoder, or one with fewer tokens than the tokenizer.
    """
    torch.manual_seed(seed)
    vocab_size = tokenization.load(tokenizer_folder).vocab_size
    if folder is None:
        return BertModel(tiny_shape(vocab_size), add_pooling_layer=False)
    model: Any = from_folder(folder, vocab_size)
    model.pooling = pooling.read(folder)
    # The head on [CLS], which pooling does not use: it gets no gradient, and DDP would wait for it.
    if getattr(model, "pooler", None) is not None:
        setattr(model, "pooler", None)  # noqa: B010 (mypy takes it for a module always)
    return model


def quiet() -> None:
    """Turn off transformers' progress bars, and its warnings about new or unused heads."""
    # It imports DeepSpeed to save a model; that must not look for a GPU, or warn about none.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    disable_progress_bar()
    set_verbosity_error()


def tiny_shape(vocab_size: int) -> BertConfig:
    """Return the shape of the small encoder of a dry run.

    It has no dropout, so that a run is the same on one process and on two.
    """
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=TINY_ENCODER_LAYERS,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=TINY_ENCODER_POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def from_folder(folder: Path, vocab_size: int) -> PreTrainedModel:
    """Return the encoder of a folder, without a head, in fp32, on the CPU.

    Raises:
        UserError: the folder holds none, or one with fewer tokens than `vocab_size`.
    """
    quiet()
    model = models.from_folder(folder, ENCODER)
    known = model.config.vocab_size
    if vocab_size > known:
        raise UserError(
            f"model.name: the tokenizer of {folder} has {vocab_size} tokens, but its embedding has "
            f"only {known}; download the model again"
        )
    return model


def max_length(model: PreTrainedModel, wanted: int) -> int:
    """Return how many tokens of a text are read: `wanted`, or the model's positions if fewer."""
    positions = int(getattr(model.config, "max_position_embeddings", wanted))
    # RoBERTa-like models count positions from the padding id on.
    if "roberta" in model.config.model_type:
        positions -= model.config.pad_token_id + 1
    return min(wanted, positions)


def tokenize(tokenizer_folder: Path, texts: Sequence[str], length: int) -> list[list[int]]:
    """Return the token ids of each text, with the encoder's special tokens, cut to `length`."""
    tokenizer = tokenization.load(tokenizer_folder).tokenizer
    tokenizer.enable_truncation(length)
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def pad(rows: Iterable[Sequence[int]], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask of (B, T), T the longest row's length."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in tensors])
    mask = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()
    return ids, mask


def pooling_of(model: Any) -> pooling.Pooling:
    """Return the pooling of a model from `load`; the mean for random weights."""
    found: pooling.Pooling = getattr(model, "pooling", pooling.Pooling())
    return found


def pool(mode: str, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return each text's vector, (B, D): the mean over its tokens, or the first one's (cls)."""
    return hidden_BTD[:, 0] if mode == "cls" else mean_pool(hidden_BTD, mask_BT)


def mean_pool(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean of each text's token vectors, (B, D), padding left out.

    As sentence-transformers does for the all-* encoders (Reimers & Gurevych 2019,
    arXiv:1908.10084).
    """
    weights = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
    return (hidden_BTD * weights).sum(1) / weights.sum(1).clamp(min=1)


def embed(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the pooled vectors, (B, D), of token ids and mask of (B, T)."""
    hidden_BTD = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return pool(pooling_of(model).mode, hidden_BTD, mask)


@torch.no_grad()
def embed_all(
    model: Any, rows: Sequence[Sequence[int]], *, batch_size: int, device: torch.device
) -> torch.Tensor:
    """Return the vectors, (N, D) on the CPU, of tokenized texts in their order; dropout off.

    Texts of similar length share a batch, which saves padding.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    vectors = torch.empty(len(rows), model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = (part.to(device) for part in pad(rows[i] for i in chosen))
        vectors[chosen] = embed(model, ids, mask).float().cpu()
    model.train(was_training)
    return vectors
