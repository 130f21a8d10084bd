"""A Hugging Face model folder: whether it is whole, and what shape it has; torch only once each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.engine.errors import UserError
from train.engine.once import datasets_folder, fingerprint, make_once, named_by_content

# Counts up when `rehearsal` asks more, so that folders are asked again.
FORMAT = 1


def check_whole(folder: Path) -> None:
    """Raise `UserError` if config.json or the weights of a folder are missing or cut short."""
    if not (folder / "config.json").exists():
        raise UserError(f"model.name: {folder} holds no config.json; give a model folder")
    for file in _weights(folder):
        if problem := _find_damage(file):
            raise UserError(f"model.name: {file} {problem}; download the model again")


def read_shape(folder: Path, kind: str) -> dict[str, Any]:
    """Return the shape of a model folder as `rehearsal.rehearse` found it, now or before.

    Raises:
        UserError: it is no model of this kind.
    """
    path = folder / "config.json"
    try:
        if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            raise UserError(f"model.name: {path} holds no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"model.name: {path} cannot be read: {error}") from None

    def make(unfinished: Path) -> None:
        from train.engine.rehearsal import rehearse

        (unfinished / "shape.json").write_text(json.dumps(rehearse(folder, kind), indent=2) + "\n")

    made_of = (FORMAT, kind, fingerprint([path, *_weights(folder)]))
    record = named_by_content(datasets_folder() / "shapes", *made_of)
    make_once(record, make, f"the shape of {folder.name}")
    shape: dict[str, Any] = json.loads((record / "shape.json").read_text())
    return shape


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
            "weights: load them with transformers where you trust them, and save_pretrained"
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
