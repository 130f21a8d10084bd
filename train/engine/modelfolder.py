"""A Hugging Face model folder: whether it is whole, and what shape it has; torch only once each."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from train.engine.errors import UserError, check_writable_folder
from train.engine.once import datasets_folder, make_once, named_by_content

# Counts up when `rehearsal` asks more, so that folders are asked again.
FORMAT = 2
# The library reads no longer one.
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
        # transformers would load the adapters along, by a file that this does not look at.
        raise UserError(
            f"model.name: {folder} holds adapters (adapter_config.json) beside a model; merge them "
            "with it, or move them to a folder of their own"
        )
    for file in _weights(folder):
        if problem := _find_damage(file):
            raise UserError(f"model.name: {file} {problem}; download the model again")


def read_json(path: Path, setting: str) -> Any:
    """Return what a JSON file of a model's folder holds; None where there is no such file.

    Raises:
        UserError: it cannot be read; `setting` is what named the folder.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {path} cannot be read: {error}") from None


def read_shape(folder: Path, kind: str) -> dict[str, Any]:
    """Return the shape of a model folder as `rehearsal.rehearse` found it, now or before.

    Raises:
        UserError: it is no model of this kind.
    """
    path = folder / "config.json"
    if not isinstance(read_json(path, "model.name"), dict):
        raise UserError(f"model.name: {path} is missing, or holds no JSON object")

    # What moves with a folder that is copied or mounted elsewhere, as on a node: the values of the
    # weights are looked at again whenever they are read.
    config = hashlib.sha256(path.read_bytes()).hexdigest()
    made_of = (FORMAT, kind, config, [_identity(file) for file in _weights(folder)])
    record = named_by_content(datasets_folder() / "shapes", *made_of)
    found: list[dict[str, Any]] = []

    def make(unfinished: Path) -> None:
        from train.engine.rehearsal import rehearse

        found.append(rehearse(folder, kind))
        (unfinished / "shape.json").write_text(json.dumps(found[0], indent=2) + "\n")

    if not record.is_dir() and not _is_writable(record.parent):
        with tempfile.TemporaryDirectory(prefix="sluice-") as scratch:
            make(Path(scratch))
        return found[0]
    make_once(record, make, f"the config of {folder.name} and the list of its weights")
    shape: dict[str, Any] = json.loads((record / "shape.json").read_text())
    return shape


def _identity(file: Path) -> tuple[str, int, str]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(min(length, MAX_HEADER))
    return file.name, file.stat().st_size, hashlib.sha256(header).hexdigest()


def _is_writable(folder: Path) -> bool:
    try:
        check_writable_folder(folder, "SLUICE_DATASETS")
    except UserError:
        return False
    return True


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
            header = json.loads(stream.read(min(length, MAX_HEADER)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, LookupError, AttributeError):
        return "is not a safetensors file"
    size = file.stat().st_size
    return f"is cut short: {size:,} of {whole:,} bytes" if size < whole else None
