"""Trains a small model under a strategy in each precision, and writes what its processes sent.

Ranks(ACCEL, NUM_PROCESSES, "tests.real.train.worker_wire", FOLDER)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from tests.models import SHAPE, wrapped
from train import tinyllama
from train.engine import arguments, models, source, strategy
from train.engine.distributed import init_distributed, rank, world_size
from train.engine.errors import run_to_exit

# (precision, reduce_dtype)
SETTINGS = (("fp32", "auto"), ("bf16", "fp32"), ("bf16", "auto"))
# Each matrix is large enough that ZeRO-3 splits it: 100,000 numbers.
LARGE = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024}
LARGE |= {"num_key_value_heads": 4}
# 300 steps of the preset `tiny`, in which it learns something.
CURVE = [
    *("--dry_run", "--max_steps", "300", "--log_every_steps", "1", "--export", "false"),
    *("--evaluation.every_steps", "300", "--checkpoint.every_steps", "300"),
    *("--batch.micro_batch_size", "4"),
]


def sent() -> int:
    """Return the bytes that this process has written to files and sockets."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


def bytes_of_a_step(device: torch.device, precision: str, reduce_dtype: str) -> float:
    """Return what all processes send in the fourth step, in bytes a parameter.

    In the first steps ZeRO-3 learns in which order weights are needed.
    """
    model = models.hollow(LlamaConfig(**{**SHAPE, **LARGE}))
    num_parameters = sum(p.numel() for p in model.parameters())
    weights = source.of_seed(model, 1)
    trained = wrapped(model, weights, device, bf16=precision == "bf16", reduce_dtype=reduce_dtype)
    tokens = torch.arange(9).unsqueeze(0) + rank()
    took = torch.zeros(1, dtype=torch.int64)
    for _ in range(4):
        before = sent()
        trained.module.train()
        batch = (tokens[:, :-1], tokens[:, 1:].contiguous())
        trained.accumulate(batch, scale=torch.tensor(1 / 8), last=True)
        trained.step()
        took.fill_(sent() - before)
    dist.all_reduce(took)
    return int(took) / num_parameters


def main(argv: list[str]) -> int:
    """Write bytes.json; with two processes also a run folder of 300 steps for each precision."""
    folder, device = Path(argv[0]), init_distributed()
    name = strategy.name_from_environment()
    found = {
        f"{precision} {reduce_dtype}": bytes_of_a_step(device, precision, reduce_dtype)
        for precision, reduce_dtype in SETTINGS
    }
    if rank() == 0:
        (folder / "bytes.json").write_text(json.dumps(found))
    # ZeRO-1 and ZeRO-2 do the same arithmetic.
    curves = {"ddp": ("fp32", "bf16"), "zero1": ()}.get(name, ("bf16",))
    for precision in curves if world_size() == 2 else ():
        words = [*CURVE, "--precision", precision]
        config = arguments.parse(tinyllama.Config, words, prog="worker", dry_run=tinyllama.DRY_RUN)
        config = tinyllama.stage(config, online=False)
        run = folder / precision
        assert tinyllama.train(config, run, device, rehearse_stop=False) == "finished"
    return 0


if __name__ == "__main__":
    run_to_exit(main)
