"""A Hugging Face model folder: what shape it has, and whether it is whole; read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.engine.errors import UserError

# What GPT-2 and DistilBERT call differently from all the others, as transformers' configs map it.
_ALIASES = {
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}


def read_shape(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder, its shape by the names that most models use.

    Raises:
        UserError: there is none, or it is not of a language model.
    """
    path = folder / "config.json"
    try:
        shape: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        shape = {_ALIASES[key]: shape[key] for key in _ALIASES.keys() & shape} | shape
        shape["vocab_size"], shape["num_hidden_layers"]
    except FileNotFoundError:
        raise UserError(f"model.name: {folder} holds no config.json; give a model folder") from None
    except KeyError as error:
        raise UserError(f"model.name: {path} is not of a language model: no {error}") from None
    except TypeError:
        raise UserError(f"model.name: {path} holds no JSON object") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.name: {path} cannot be read: {error}") from None
    return shape


def check(folder: Path) -> None:
    """Raise `UserError` unless the folder holds a language model with all of its weights."""
    read_shape(folder)
    for file in _weights(folder):
        if problem := _find_damage(file):
            raise UserError(f"model.name: {file} {problem}; download the model again")


def _weights(folder: Path) -> list[Path]:
    """Return the files that transformers would load: one, or those that an index names."""
    whole = folder / "model.safetensors"
    if whole.exists():
        return [whole]
    index = folder / "model.safetensors.index.json"
    try:
        names: set[str] = set(json.loads(index.read_bytes())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except FileNotFoundError:
        raise UserError(
            f"model.name: {folder} holds neither {whole.name} nor {index.name}; convert its "
            "weights first"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"model.name: {index} is damaged; download the model again") from None


def _find_damage(file: Path) -> str | None:
    """Return what is wrong with a safetensors file, as far as its header tells.

    8 bytes with the header's length, the header in JSON, the tensors one after the other.
    """
    if not file.exists():
        return "is missing"
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            if start == b"version ":
                return "is a pointer of Git LFS, not the weights"
            length = int.from_bytes(start, "little")
            header = json.loads(stream.read(min(length, 100_000_000)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, LookupError, AttributeError):
        return "is not a safetensors file"
    size = file.stat().st_size
    return f"is cut short: {size:,} of {whole:,} bytes" if size < whole else None
