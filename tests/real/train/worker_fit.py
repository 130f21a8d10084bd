"""Trains small models under a strategy, and writes how many bytes their tensors took at most.

Ranks(ACCEL, NUM_PROCESSES, "tests.real.train.worker_fit", FOLDER)
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from tests.models import SHAPE, wrapped
from train.engine import models, source, strategy
from train.engine.distributed import init_distributed, rank, world_size
from train.engine.errors import run_to_exit
from train.engine.footprint import Live

LARGE = {**SHAPE, "vocab_size": 4000, "hidden_size": 256, "intermediate_size": 704}
LARGE |= {"num_hidden_layers": 4, "max_position_embeddings": 128}
# (family, micro batch, how many of them, bf16, gradient checkpointing): more activations than
# weights, and fewer; gradients of one micro batch, and of several.
CASES = (
    ("llama", 8, 1, False, False),
    ("llama", 8, 1, True, False),
    ("llama", 8, 1, True, True),
    ("llama", 1, 1, False, False),
    ("llama", 1, 3, False, False),
    ("llama", 4, 2, True, True),
    ("gpt2", 4, 1, True, False),
)
SEQUENCE_LENGTH = 128


def config_of(family: str) -> PretrainedConfig:
    """Return the config of a model that is large enough to be split."""
    return CONFIG_MAPPING[family](**LARGE)


class Recounting(Live):
    """Also knows tensors whose storage is emptied and filled again, as FSDP2 does."""

    def _count(self, tensor: Any) -> None:
        super()._count(getattr(tensor, "_local_tensor", tensor))
        alive = [storage for made in self._made.values() if (storage := made()) is not None]
        self.now = sum(storage.nbytes() for storage in alive)
        self.peak = max(self.peak, self.now)


def peak(case: tuple[str, int, int, bool, bool], name: str, device: torch.device) -> int:
    """Return the most bytes that this process had in tensors, from the second step on."""
    family, micro_batch_size, num_micro_batches, bf16, gradient_checkpointing = case
    with (Recounting if name == "fsdp2" else Live)() as live:
        model = models.hollow(config_of(family))
        if gradient_checkpointing:
            model.activation_checkpointing_enable()
        trained = wrapped(
            model,
            source.of_seed(model, 1),
            device,
            bf16=bf16,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=num_micro_batches,
        )
        for step in range(2):
            if step == 1:
                # Not whenever Python likes: DeepSpeed leaves cycles that hold tensors.
                gc.collect()
                live.start_anew()
            trained.module.train()
            shape = (micro_batch_size, SEQUENCE_LENGTH)
            tokens = torch.full(shape, step + rank(), dtype=torch.int64)
            for number in range(1, num_micro_batches + 1):
                last = number == num_micro_batches
                trained.accumulate((tokens, tokens), scale=torch.tensor(1e-3), last=last)
            trained.step()
        return live.peak


def main(argv: list[str]) -> int:
    """Write the peak of each case, as rank 0 found it."""
    device = init_distributed()
    name = strategy.name_from_environment()
    gc.disable()
    found = [peak(case, name, device) for case in CASES]
    if rank() == 0:
        (Path(argv[0]) / f"{name}-on-{world_size()}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    run_to_exit(main)
