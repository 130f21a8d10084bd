"""How transformers would load a model folder, checked before a job is queued.

The result is kept in the datasets folder, so that torch is imported once per model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from train.engine.models import empty, from_folder, layers
from train.engine.pretrained import LANGUAGE_MODEL, load, named

# A model of at most this many parameters is loaded completely, so that problems with its values
# are found before a job is queued; in fp32 they take 2 GB of memory. For a larger model they are
# found when it is trained.
READ_WHOLE = 500_000_000


def rehearse(folder: Path, kind: str) -> dict[str, Any]:
    """Return the shape of the `kind` that a folder holds, by the names that most models use.

    vocab_size (rows of the embedding), num_hidden_layers, max_position_embeddings (None: no
    limit), model_type, pad_token_id, and `notes` for the user.

    Raises:
        UserError: transformers cannot load it as `kind`, it is quantized or takes more than text,
            or its files lack a weight, or have one of another shape than config.json says.
    """
    model, loading = load(folder, kind, device_map="meta")
    config = model.config
    if kind == LANGUAGE_MODEL:
        _check_trainable(folder, model)
    if sum(p.numel() for p in model.parameters()) <= READ_WHOLE:
        from_folder(folder, kind)
    embedding: Any = model.get_input_embeddings()
    return {
        "model_type": config.model_type,
        "vocab_size": int(embedding.weight.shape[0]),
        "num_hidden_layers": int(config.num_hidden_layers),
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "pad_token_id": getattr(config, "pad_token_id", None),
        "notes": loading["notes"],
    }


def _check_trainable(folder: Path, model: Any) -> None:
    """Raise `UserError` for a model that cannot be split into layers, or cannot be exported."""
    try:
        layers(model)
    except StopIteration:
        raise UserError(
            f"model.name: {folder}: {model.config.model_type} has no list of its "
            f"{model.config.num_hidden_layers} layers for the strategies to split; give another "
            "model"
        ) from None
    with tempfile.TemporaryDirectory(prefix="sluice-") as scratch:
        # An export is made from a checkpoint, which has the model's config.
        model.config.save_pretrained(scratch)
        again = empty(Path(scratch))
    lost = sorted(set(model.state_dict()) ^ set(again.state_dict()))
    if lost:
        raise UserError(
            f"model.name: {folder}: saving and loading its config.json gives a different model, "
            f"and an export would lose {named(lost)}; give another model"
        )
