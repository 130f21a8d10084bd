"""A Hugging Face model folder as files: whether it is complete, by its headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runfolder.errors import UserError

# The library rejects a longer one.
MAX_HEADER = 100_000_000


def check_whole(folder: Path) -> None:
    """Raise `UserError` if config.json or the weights of a folder are missing or cut short."""
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise UserError(
                f"model.name: {folder} holds adapters (LoRA), not the model that they belong to; "
                "merge them with it first"
            )
        raise UserError(f"model.name: {folder} holds no config.json; give a model folder")
    if (folder / "adapter_config.json").exists():
        # transformers would load the adapters too, from a file that is not checked here.
        raise UserError(
            f"model.name: {folder} holds adapters (adapter_config.json) beside a model; merge them "
            "with it, or move them to a folder of their own"
        )
    for file in weights_of(folder):
        if problem := _find_damage(file):
            raise UserError(f"model.name: {file} {problem}; download the model again")


def read_json(path: Path, setting: str) -> Any:
    """Return the content of a JSON file of a model's folder; None if there is no such file.

    Raises:
        UserError: it cannot be read; `setting` is what named the folder.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {path} cannot be read: {error}") from None


def weights_of(folder: Path) -> list[Path]:
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
            "weights: if you trust them, load them with transformers and call save_pretrained"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"model.name: {index} is damaged; download the model again") from None


def _find_damage(file: Path) -> str | None:
    """Return what is wrong with a safetensors file, as far as its header shows.

    8 bytes with the header's length, the header in JSON, the tensors one after the other.
    """
    if not file.exists():
        return "is missing"
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            if start == b"version ":
                return "is a Git LFS pointer, not the weights"
            length = int.from_bytes(start, "little")
            header = json.loads(stream.read(min(length, MAX_HEADER)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, LookupError, AttributeError):
        return "is not a safetensors file"
    size = file.stat().st_size
    return f"is cut short: {size:,} of {whole:,} bytes" if size < whole else None
