"""Reading checkpoints: whether one is complete, its state and its tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from runfolder.checkpoints import made_with
from runfolder.errors import UserError
from train.engine.durable import sha256

FORMAT = 1
# Beside the states of the parameters; as the model has it, in its own dtype.
BUFFER = "buffer"
GENERATION = "generation_config.json"
# (name, state) or (name, state, slice) -> the tensor, or these rows of its first dimension.
ReadState = Callable[..., torch.Tensor]


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return what is wrong with a checkpoint, or None; hashes every `parts`-th file from `part`."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        expected = sorted(manifest["files"].items())
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json cannot be read"
    name = ""
    try:
        for name, entry in expected:
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        for name, entry in expected[part::parts]:
            if sha256(folder / name) != entry["sha256"]:
                return f"{name} does not match its sha256"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def read_state(folder: Path, must_match: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the state.json of a checkpoint.

    `must_match` holds the values that the checkpoint depends on; a key that the checkpoint lacks,
    because its script added it later, is not a mismatch.

    Raises:
        UserError: it was written by a newer Sluice, or with other values than `must_match`.
    """
    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["format"] > FORMAT:
        raise UserError(f"{folder}: has format {state['format']}; this Sluice reads up to {FORMAT}")
    for key, value in (must_match or {}).items():
        if key in state and state[key] != value:
            raise made_with(folder, key, state[key], value)
    return state


def reader(folder: Path) -> tuple[ReadState, list[str]]:
    """Return a function (name, state, rows) -> tensor over a checkpoint, and the parameters' names.

    Tensors are read one by one, so memory holds one at a time; `rows`, a slice of the first
    dimension, is all of it unless given.
    """
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("shard-*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def read(name: str, state: str, rows: slice = slice(None)) -> torch.Tensor:
        key = f"{state}/{name}"
        if rows == slice(None):
            return where[key].get_tensor(key)
        return where[key].get_slice(key)[rows]

    return read, [key.partition("/")[2] for key in where if key.startswith("weight/")]


def read_buffers(folder: Path) -> dict[str, torch.Tensor]:
    """Return the buffers of a checkpoint by their names."""
    found = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.startswith(f"{BUFFER}/"):
                    found[key.removeprefix(f"{BUFFER}/")] = file.get_tensor(key)
    return found


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights and buffers into the trainable part of a matching model."""
    read, names = reader(folder)
    buffers = dict(model.named_buffers())
    for name, value in read_buffers(folder).items():
        buffers[name].copy_(value)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(names) == set(parameters), set(names) ^ set(parameters)
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(read(name, "weight"))
