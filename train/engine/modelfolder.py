"""A Hugging Face model folder: what shape it has, and whether it is whole; read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.engine.errors import UserError


def read_shape(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder.

    Raises:
        UserError: there is none, or it is not of a language model.
    """
    path = folder / "config.json"
    try:
        shape: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        shape["vocab_size"], shape["num_hidden_layers"]
    except FileNotFoundError:
        raise UserError(f"model.name: {folder} holds no config.json; give a model folder") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"model.name: {path} is not of a language model: no {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.name: {path} cannot be read: {error}") from None
    return shape


def check(folder: Path) -> None:
    """Raise `UserError` unless the folder holds a language model with all of its weights."""
    read_shape(folder)
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files |= {
                folder / name for name in json.loads(index.read_bytes())["weight_map"].values()
            }
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"model.name: {index} is damaged; download the model again") from None
    if not files:
        raise UserError(f"model.name: {folder} holds no *.safetensors; convert its weights first")
    for file in sorted(files):
        if problem := _find_damage(file):
            raise UserError(f"model.name: {file} {problem}; download the model again")


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
    except (ValueError, TypeError, KeyError, AttributeError):
        return "is not a safetensors file"
    whole = 8 + length + max(ends, default=0)
    size = file.stat().st_size
    return f"is cut short: {size:,} of {whole:,} bytes" if size < whole else None
