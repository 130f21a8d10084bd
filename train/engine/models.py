"""The model: a folder's weights, a preset's random ones, or a checkpoint's."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from runfolder.errors import UserError
from train.engine import source, tokenization
from train.engine.config import TrainingConfig
from train.engine.once import staged_path
from train.engine.presets import PRESETS
from train.engine.pretrained import (
    ENCODER,
    LANGUAGE_MODEL,
    check_finite,
    load,
    not_read,
    read_config,
)
from train.engine.source import Source

# What must match between models of one run; the rest of config.json may differ by version.
SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def plan(
    config: TrainingConfig, tokenizer_folder: Path, seed: int
) -> tuple[PreTrainedModel, Source | None]:
    """Return the model that training starts from, in fp32, and where its weights are.

    Without weights, on the meta device; or with them, on the CPU, and None: where transformers
    does more than to read a folder's weights by name.
    """
    found: tuple[PreTrainedModel, Source | None]
    if config.model.preset is not None:
        model = hollow(preset_config(config.model.preset, tokenizer_folder))
        found = model, source.of_seed(model, seed)
    else:
        assert config.staged is not None and config.staged.model is not None
        found = _of_folder(staged_path(config.staged.model))
    if config.model.gradient_checkpointing:
        found[0].activation_checkpointing_enable()
    return found


def build(config: TrainingConfig, tokenizer_folder: Path, seed: int) -> PreTrainedModel:
    """Return the model that training starts from, with all weights, in fp32 on the CPU."""
    model, weights = plan(config, tokenizer_folder, seed)
    if weights is not None:
        source.place_whole(model, weights, torch.device("cpu"))
    return model


def _of_folder(folder: Path) -> tuple[PreTrainedModel, Source | None]:
    config = read_config(folder)
    model = hollow(config)
    # Some compute a table of positions from a parameter, which has no values here.
    has_tables = not any(buffer.is_meta for buffer in model.buffers())
    weights = source.of_folder(folder, model) if has_tables else None
    one = one_layer(config) if weights else None
    if one is None:
        return from_folder(folder), None
    _check_sees(folder, LANGUAGE_MODEL, one)
    with suppress(OSError):
        # Otherwise it is that of config.json.
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, weights


def hollow(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model whose parameters have no values; its buffers do."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # In there, a parameter that belongs to two modules became two.
    model.tie_weights()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return model.eval()


def one_layer(config: PretrainedConfig) -> PreTrainedModel | None:
    """Return a model of this kind with one layer and few tokens; None if there is no such model."""
    small = copy.deepcopy(config)
    try:
        small.num_hidden_layers, small.vocab_size = 1, 64
        small.pad_token_id = small.bos_token_id = small.eos_token_id = None
        if getattr(small, "layer_types", None):
            small.layer_types = small.layer_types[:1]
        return AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    except Exception:  # what a family's own config wants of its other fields
        return None


def from_folder(folder: Path, kind: str = LANGUAGE_MODEL) -> PreTrainedModel:
    """Return the model of a Hugging Face folder, in fp32 on the CPU and in eval mode.

    Raises:
        UserError: it cannot be loaded, is not causal, or its files lack a weight or hold one that
            is not finite.
    """
    model: PreTrainedModel = load(folder, kind)[0]
    check_finite(folder, model.state_dict())
    _check_sees(folder, kind, model)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return model


@torch.no_grad()
def _check_sees(folder: Path, kind: str, model: PreTrainedModel) -> None:
    """Raise `UserError` if a language model looks ahead, or an encoder does not.

    Changes one token of a text and checks the model's outputs for the tokens before it.
    """
    embedding: Any = model.get_input_embeddings()
    vocab_size = int(embedding.weight.shape[0])
    length = min(12, getattr(model.config, "max_position_embeddings", None) or 12)
    changed = length * 2 // 3
    # Special tokens, such as padding, mostly have the first or the last ids.
    first = torch.arange(length)[None] * 5 % max(1, vocab_size // 2) + vocab_size // 4
    second = first.clone()
    second[0, changed] = (first[0, changed] + vocab_size // 8 + 1) % vocab_size
    caches = {"use_cache": False} if kind == LANGUAGE_MODEL else {}
    try:
        one, other = (
            model(input_ids=ids, **caches)[0][0, :changed].float() for ids in (first, second)
        )
    except Exception as error:  # anything, from a model that needs more than ids
        raise not_read(folder, kind, model.config, error) from None
    # Experts see batches of other sizes, and sum in another order.
    looks_ahead = bool((one - other).abs().max() > 1e-4 * one.abs().max())
    where = f"model.name: {folder}: {model.config.model_type}"
    if kind == LANGUAGE_MODEL and looks_ahead:
        raise UserError(
            f"{where} attends in both directions and would learn to copy; give a causal language "
            "model, such as Llama or GPT-2, or set is_decoder in its config.json"
        )
    if kind == ENCODER and not looks_ahead:
        raise UserError(
            f"{where} is a causal model; give an encoder, such as "
            "sentence-transformers/all-MiniLM-L6-v2"
        )


def from_preset(preset: str, tokenizer_folder: Path, seed: int) -> PreTrainedModel:
    """Return a preset's model with random weights, in fp32 on the CPU.

    They are drawn on the CPU whatever the device, so that a seed gives the same model everywhere.
    """
    model = hollow(preset_config(preset, tokenizer_folder))
    source.place_whole(model, source.of_seed(model, seed), torch.device("cpu"))
    return model


def preset_config(preset: str, tokenizer_folder: Path) -> LlamaConfig:
    """Return the config of a preset, with the special tokens of a tokenizer."""
    tokenizer = tokenization.load(tokenizer_folder)
    shape = vars(PRESETS[preset]).copy()
    shape["vocab_size"] = max(shape["vocab_size"], tokenizer.vocab_size)
    return LlamaConfig(
        **shape, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, dtype="float32"
    )


@torch.no_grad()
def add_tokens(
    model: PreTrainedModel, vocab_size: int, weights: Source | None = None
) -> Source | None:
    """Give a model rows for `vocab_size` tokens; each new one is the mean of those it had.

    The new tokens then change the probabilities of the others least (Hewitt 2021, "Initializing
    new word embeddings for pretrained language models"). Returns where its weights are, if it has
    none yet: `weights`, with these rows.
    """
    embedding: Any = model.get_input_embeddings()
    known = embedding.weight.shape[0]
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    named = [getattr(part, name, None) for part in parts for name in ("weight", "bias")]
    longer: list[Any] = [tensor for tensor in named if tensor is not None]
    if weights is not None:
        ids = {id(tensor) for tensor in longer}
        names = {name for name, p in model.named_parameters() if id(p) in ids}
        return source.with_rows(weights, names, vocab_size)
    for rows in longer:
        rows[known:] = rows[:known].mean(dim=0)
    return None


def end_with(model: PreTrainedModel, end_ids: Iterable[int]) -> None:
    """Let the texts of a model also end with these tokens, wherever it is loaded."""
    settings = model.generation_config
    known = settings.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    # The one that it had stays the first.
    settings.eos_token_id = list(dict.fromkeys([*known, *sorted(end_ids)]))


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a model, the lowest first, whatever its architecture calls them."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next(found for found in lists if len(found) == model.config.num_hidden_layers)


def check_same_shape(model: PreTrainedModel, checkpoint: Path) -> None:
    """Raise `UserError` if the config.json of a checkpoint has a different architecture."""
    saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for key in SHAPE:
        mine = getattr(model.config, key, None)
        if key in saved and saved[key] != mine:
            raise UserError(
                f"{checkpoint}: is of another model: {key} is {saved[key]} there and {mine} here; "
                "continue it with its own settings, or start a new run"
            )


def empty(config_folder: Path) -> PreTrainedModel:
    """Return the model of a config.json without weights (on the meta device)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(config_folder, local_files_only=True), dtype=torch.float32
        )


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> float:
    """Return the floating-point operations of one token's forward and backward pass.

    6 N + 12 L d T: N the parameters that multiply (embedding look-ups do not), L layers, d the
    hidden size, T the sequence length; attention counted as if not causal. Chowdhery et al. 2022
    (PaLM), arXiv:2204.02311, appendix B. A frozen parameter takes 4 of the 6: its own gradient is
    not needed.
    """
    config = model.config
    parameters = sum((6 if p.requires_grad else 4) * p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        lookup: Any = model.get_input_embeddings().weight
        parameters -= (6 if lookup.requires_grad else 4) * lookup.numel()
    attention = 12 * config.num_hidden_layers * config.hidden_size * sequence_length
    return float(parameters + attention)


def weights_sha256(model: nn.Module, *, frozen_only: bool = False) -> str:
    """Return the hash of a model's weights, whatever files they came from.

    `frozen_only` leaves out the parameters that train.
    """
    digest = hashlib.sha256()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and frozen_only}
    for name, tensor in sorted(model.state_dict().items()):
        if name not in trained:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
