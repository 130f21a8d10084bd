"""Where a model's weights come from, a tensor at a time: a folder, a checkpoint, or a seed.

A model is made without weights (on torch's meta device) and gets them where it is split: so no
process holds more of it than its share, and the tensor that it is reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from runfolder.errors import UserError
from train.engine import checkpoint_reader
from train.engine.distributed import gather_strings
from train.engine.modelfolder import weights_of
from train.engine.pretrained import check_finite

# All rows of a tensor, of its first dimension.
ALL = slice(None)


@dataclass(frozen=True)
class Source:
    """The weights of a model by the names of its parameters and buffers."""

    read: Callable[[str, slice], torch.Tensor]
    """Return rows of a tensor, those of a slice: in fp32 (if it is of floats) on the CPU."""
    has: Callable[[str], bool]
    identity: str
    """The same for the same weights."""


def of_folder(folder: Path, model: PreTrainedModel) -> Source | None:
    """Return the weights in a Hugging Face folder, which was checked when it was staged.

    None where transformers does more than to read them by name: it merges the experts of a
    mixture, for example, or names them as an older version did.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    files = [safe_open(path, framework="pt") for path in weights_of(folder)]
    where: dict[str, Any] = {key: file for file in files for key in file.keys()}  # noqa: SIM118
    tensors = {**dict(model.named_parameters()), **dict(_persistent_buffers(model))}
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(tensors)
    by_name = (
        get_checkpoint_conversion_mapping(model.config.model_type) is None
        and all(name in where for name in tensors)
        # A head that the files have beside the embedding is kept, whatever config.json says.
        and not any(name in where for name in aliases)
        and all(
            list(where[name].get_slice(name).get_shape()) == list(tensor.shape)
            for name, tensor in tensors.items()
        )
    )
    if not by_name:
        return None

    def sample(name: str) -> list[object]:
        """Return some rows as they are stored: another model of this shape has other ones."""
        stored = where[name].get_slice(name)
        if not stored.get_shape():
            rows = [where[name].get_tensor(name).reshape(1)]
        else:
            last = stored.get_shape()[0] - 1
            rows = [stored[row : row + 1] for row in (0, last // 2, last)]
        return [name, *(row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows)]

    def read(name: str, rows: slice) -> torch.Tensor:
        values: torch.Tensor = (
            where[name].get_tensor(name) if rows == ALL else where[name].get_slice(name)[rows]
        )
        check_finite(folder, {name: values})
        return values.to(torch.float32) if values.is_floating_point() else values

    return Source(read, where.__contains__, _hash([*map(sample, sorted(tensors))]))


def of_checkpoint(folder: Path) -> Source:
    """Return the weights in a checkpoint of a run."""
    stored, names = checkpoint_reader.reader(folder)
    buffers = checkpoint_reader.read_buffers(folder)

    def read(name: str, rows: slice) -> torch.Tensor:
        return buffers[name] if name in buffers else stored(name, "weight", rows)

    known = {*names, *buffers}
    return Source(read, known.__contains__, _hash((folder / "manifest.json").read_bytes()))


def of_seed(model: PreTrainedModel, seed: int) -> Source:
    """Return random weights for a preset's Llama, as transformers draws them.

    Matrices are normal with the config's initializer_range, norms are ones. Each is drawn from a
    generator of its own, so that it depends on the seed and its name alone: not on the strategy,
    the number of processes, or the order.
    """
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}

    def read(name: str, rows: slice) -> torch.Tensor:
        if len(shapes[name]) < 2:
            return torch.ones(shapes[name], device="cpu")[rows]
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) % 2**63)
        drawn = torch.empty(shapes[name], device="cpu").normal_(
            0.0, model.config.initializer_range, generator=generator
        )
        return drawn[rows]

    return Source(read, shapes.__contains__, _hash([seed, sorted(shapes)]))


def with_rows(source: Source, names: set[str], num_rows: int) -> Source:
    """Return these weights, but some with `num_rows` rows: a new one is the mean of the known."""

    def read(name: str, rows: slice) -> torch.Tensor:
        if name not in names:
            return source.read(name, rows)
        known = source.read(name, ALL)
        new = known.mean(dim=0, keepdim=True).expand(num_rows - len(known), *known.shape[1:])
        return torch.cat([known, new])[rows]

    return Source(read, source.has, _hash([source.identity, sorted(names), num_rows]))


def assert_same(source: Source) -> None:
    """Raise `UserError` if the ranks read different weights; collective."""
    if len(set(gather_strings(source.identity))) > 1:
        raise UserError(
            "the processes start from different weights; they need the same seed and model folder"
        )


def place(model: nn.Module, source: Source, device: torch.device) -> Iterator[nn.Module]:
    """Give the parameters of a model their values, module by module, the innermost first.

    Yields each module whose own parameters have just been read, whole, to `device`: who wants
    less of them splits them before the next is read. Buffers are read first.
    """
    # A tied parameter belongs to several modules, and is read by its first name.
    names = {id(p): name for name, p in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    read_buffers(model, source)
    for module in reversed(list(model.modules())):
        for own, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                values = source.read(names[id(parameter)], ALL).to(device)
                made[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
                del values
            setattr(module, own, made[id(parameter)])
        for own, buffer in module.named_buffers(recurse=False):
            module._buffers[own] = buffer.to(device)
        yield module


@torch.no_grad()
def read_buffers(model: nn.Module, source: Source) -> None:
    """Give the buffers of a model that belong to its state their values."""
    for name, buffer in _persistent_buffers(model):
        if source.has(name):
            buffer.copy_(source.read(name, ALL))


def place_whole(model: nn.Module, source: Source, device: torch.device) -> None:
    """Give a model all of its weights, on `device`."""
    for _ in place(model, source, device):
        pass


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
