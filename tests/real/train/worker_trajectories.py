"""Trains in one start all that test_trajectories compares of a strategy.

Ranks(ACCEL, NUM_PROCESSES, "tests.real.train.worker_trajectories", FOLDER)
"""

from __future__ import annotations

from pathlib import Path

import torch

from train import tinyllama
from train.engine import arguments, signals
from train.engine.distributed import init_distributed, rank, world_size
from train.engine.errors import RunFailed, run_to_exit

# The folder of the run that diverges, beside those that are compared.
DIVERGED = "diverged"
SETTINGS = [
    *("--dry_run", "--max_steps", "8", "--log_every_steps", "1", "--export", "false"),
    *("--evaluation.every_steps", "8", "--evaluation.max_tokens", "256"),
    *("--optimizer.max_grad_norm", "0.5", "--checkpoint.every_steps", "100"),
]


def main(argv: list[str]) -> int:
    """Write a folder with all runs."""
    folder, device = Path(argv[0]), init_distributed()
    accumulate(folder, device)
    diverge(folder / DIVERGED, device)
    return 0


def accumulate(folder: Path, device: torch.device) -> None:
    """Write a run folder for each accumulation; with the most also of a run stopped half-way."""
    for accumulation in (1, 4):
        micro = 8 // world_size() // accumulation
        words = [*SETTINGS, "--batch.micro_batch_size", str(micro)]
        config = arguments.parse(tinyllama.Config, words, prog="worker", dry_run=tinyllama.DRY_RUN)
        config = tinyllama.stage(config, online=False)
        straight = folder / f"accumulation{accumulation}-straight"
        assert tinyllama.train(config, straight, device, rehearse_stop=False) == "finished"
        # On two processes: tests/fast/train/test_strategies.py.
        if world_size() > 1 or accumulation == 1:
            continue
        resumed = folder / f"accumulation{accumulation}-resumed"
        signals.install()
        assert tinyllama.train(config, resumed, device, rehearse_stop=True) == "rehearsed"
        signals.forget_rehearsal()
        assert tinyllama.train(config, resumed, device, rehearse_stop=False) == "finished"


def diverge(run_folder: Path, device: torch.device) -> None:
    """Train until the loss is not finite; leave what is said of it in a file of each rank."""
    words = [*SETTINGS, "--optimizer.lr", "1e25", "--schedule.warmup_steps", "0"]
    config = arguments.parse(tinyllama.Config, words, prog="worker", dry_run=tinyllama.DRY_RUN)
    config = tinyllama.stage(config, online=False)
    try:
        tinyllama.train(config, run_folder, device, rehearse_stop=False)
    except RunFailed as error:
        (run_folder / f"error-{rank()}").write_text(str(error))


if __name__ == "__main__":
    run_to_exit(main)
