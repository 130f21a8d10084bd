"""A rank that starts a model of some 130 MB, and prints what that took: the size of the model, and
the most memory above that of the imports, in bytes.

    python -m tests.fast.train.engine.worker_start read|whole
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

from tests.models import wrapped
from train.engine import models, source
from train.engine.distributed import init_distributed

SHAPE = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "tie_word_embeddings": True,
}


def memory(key: str) -> int:
    """Return a figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main(how: str) -> None:
    device = init_distributed()
    # Imports are made by a first, tiny model.
    start(device, how, {**SHAPE, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 8})
    gc.collect()
    # The peak starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    num_parameters = start(device, how, SHAPE)
    took = memory("VmHWM") - before
    print(json.dumps({"model": 4 * num_parameters, "took": took}), flush=True)


def start(device: torch.device, how: str, shape: dict[str, int]) -> int:
    model = models.hollow(LlamaConfig(**shape))
    num_parameters = sum(p.numel() for p in model.parameters())
    weights: source.Source | None = source.of_seed(model, 1)
    if how == "whole":
        source.place_whole(model, weights, torch.device("cpu"))
        weights = None
    wrapped(model, weights, device)
    return num_parameters


if __name__ == "__main__":
    main(sys.argv[1])
