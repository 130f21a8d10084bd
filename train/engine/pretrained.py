"""A model folder as transformers loads it, with errors and notes where it only logs.

`from_pretrained` gives a weight that the files lack a random value, ignores weights that it does
not use, and reports both in a log. Here the first is an error and the second a note.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runfolder.errors import UserError

LANGUAGE_MODEL, ENCODER = "language model", "encoder"
# Named in a message; the rest is counted.
SHOWN = 3


def load(folder: Path, kind: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model of a folder in fp32 and eval mode, and transformers' report on it.

    Raises:
        UserError: it is not of this kind, or its files lack a weight or have another shape.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    config = read_config(folder)
    disable_progress_bar()
    # What it would report is printed here, in one line.
    set_verbosity_error()
    kinds = {LANGUAGE_MODEL: AutoModelForCausalLM, ENCODER: AutoModel}
    try:
        # Without dtype the weights would come in the precision they were stored in.
        model, loading = kinds[kind].from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:  # whatever transformers and its dependencies raise
        raise not_read(folder, kind, config, error) from None
    _check_weights(folder, kind, model, loading)
    loading["notes"] = _notes(folder, model, loading)
    if model.config.tie_word_embeddings and has_own_head(model):
        # transformers uses the head that the files have; an export must not tie it again.
        model.config.tie_word_embeddings = False
        loading["notes"].append(
            f"model.name: {folder}: config.json ties the head to the embedding, but the files have "
            "a separate head; it is kept, and trained separately"
        )
    return model, loading


def has_own_head(model: Any) -> bool:
    """Return whether a model's head has other weights than its embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is not model.get_input_embeddings().weight


def read_config(folder: Path) -> Any:
    """Return the config of a folder; the model must take only text and not be quantized.

    Raises:
        UserError: it is not such a model.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"model.name: {folder} holds no config.json; give a model folder")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers and its dependencies raise
        raise not_read(folder, "model", json.loads(path.read_bytes()), error) from None
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"model.name: {path}: the weights are quantized and cannot be trained; give the "
            "original model"
        )
    if config.is_encoder_decoder:
        raise UserError(
            f"model.name: {path}: {config.model_type} is an encoder-decoder model, which no "
            "script here trains; give a causal language model, such as a Llama or GPT-2"
        )
    if config.get_text_config() is not config:
        raise UserError(
            f"model.name: {path}: {config.model_type} takes more than text; save its language "
            "model separately, with its own config.json, and give that"
        )
    missing = [k for k in ("vocab_size", "num_hidden_layers") if not hasattr(config, k)]
    if missing:
        raise UserError(f"model.name: {path} is not of a language model: it has no {missing[0]!r}")
    return config


def not_read(folder: Path, kind: str, config: Any, error: Exception) -> UserError:
    """Return the one-line error for a folder that transformers cannot load."""
    import transformers

    fields = config if isinstance(config, dict) else config.to_dict()
    model_type = fields.get("model_type")
    text = str(error)
    where = f"model.name: {folder}"
    if fields.get("auto_map") and "trust_remote_code" in text:
        return UserError(
            f"{where}: {model_type} needs custom code (trust_remote_code), which is not run here; "
            "choose a model that is built into transformers"
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return UserError(
            f"{where}: transformers {transformers.__version__} does not know model_type "
            f"{model_type!r}; correct config.json, or give another model"
        )
    if "Unrecognized configuration class" in text:
        return UserError(
            f"{where}: {model_type} is not a causal {kind} (it has no AutoModelForCausalLM); give "
            "one, such as a Llama or GPT-2"
        )
    lines = text.strip().splitlines() or [type(error).__name__]
    return UserError(f"{where} cannot be loaded as {_a(kind)}: {lines[0]}")


def check_finite(folder: Path, weights: Mapping[str, Any]) -> None:
    """Raise `UserError` if a weight of a folder's model is not a number."""
    import torch

    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"model.name: {folder}: {name} holds values that are not finite; download the "
                "model again, or give another"
            )


def _check_weights(folder: Path, kind: str, model: Any, loading: dict[str, Any]) -> None:
    where = f"model.name: {folder}"
    for name, given, wanted in sorted(loading["mismatched_keys"]):
        if not _is_head(model, kind, name):
            raise UserError(
                f"{where}: {name} has shape {tuple(given)} in the file, but {tuple(wanted)} by "
                "config.json; give the config.json that belongs to the weights"
            )
    lacking = sorted(n for n in loading["missing_keys"] if not _is_head(model, kind, n))
    if lacking:
        hint = "give the files that belong to config.json"
        if all(not name.startswith(f"{model.base_model_prefix}.") for name in lacking):
            made = ", ".join(model.config.architectures or ["a model without a head"])
            hint = f"they belong to {made}, not to {_a(kind)}; give one"
        unused = sorted(loading["unexpected_keys"])
        if prefix := _common_prefix(lacking, unused):
            hint = f"in the files, their names begin with {prefix}; save them without it"
        raise UserError(
            f"{where}: its files lack {_count(lacking, 'weight')} of config.json's model "
            f"({named(lacking)}); {hint}"
        )


def _is_head(model: Any, kind: str, name: str) -> bool:
    """Return whether a weight belongs to what the task replaces: an encoder's pooler, or a head."""
    if kind == LANGUAGE_MODEL:
        return False
    prefix = f"{model.base_model_prefix}."
    in_base = model.base_model is model or name.startswith(prefix)
    return not in_base or name.removeprefix(prefix).startswith("pooler.")


def _notes(folder: Path, model: Any, loading: dict[str, Any]) -> list[str]:
    prefix = f"{model.base_model_prefix}."
    alone = model.base_model is model
    unused = sorted(loading["unexpected_keys"])
    # A head, where the model is asked for without one.
    heads = [name for name in unused if alone and not name.startswith(prefix)]
    others = [name for name in unused if name not in heads]
    told = ((heads, "of a head that is"), (others, f"that {'is' if len(others) == 1 else 'are'}"))
    return [
        f"model.name: {folder}: ignored {_count(names, 'weight')} {what} not used ({named(names)})"
        for names, what in told
        if names
    ]


def _common_prefix(lacking: list[str], unused: Iterable[str]) -> str | None:
    """Return the prefix of all names in a file (`_orig_mod.` of torch.compile), if there is one."""
    first = next((name for name in unused if name.endswith(lacking[0])), None)
    prefix = first and first.removesuffix(lacking[0])
    names = set(unused)
    return prefix if prefix and all(f"{prefix}{name}" in names for name in lacking) else None


def named(names: list[str]) -> str:
    """Return the first few names of weights, for a message."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
