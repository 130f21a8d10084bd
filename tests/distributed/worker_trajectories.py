"""Trains in one launch, under every strategy, all that test_trajectories compares.

accelerate launch ... -m tests.distributed.worker_trajectories FOLDER
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.conftest import losses
from tests.distributed import strategies
from train import tinyllama
from train.engine import arguments, signals
from train.engine.distributed import init_distributed, is_main_process, rank, world_size
from train.engine.errors import RunFailed, run_to_exit

# The folder of the run that diverges, beside those that are compared.
DIVERGED = "diverged"
SETTINGS = [
    *("--dry_run", "--max_steps", "8", "--log_every_steps", "1", "--export", "false"),
    *("--evaluation.every_steps", "4", "--evaluation.max_tokens", "512"),
    *("--optimizer.max_grad_norm", "0.5"),
]


def main(argv: list[str]) -> int:
    """Write, for each strategy, a folder with all its runs."""
    device = init_distributed()
    for accel in strategies.each():
        folder = Path(argv[0]) / accel
        accumulate(folder, device)
        diverge(folder / DIVERGED, device)
    return 0


def accumulate(folder: Path, device: torch.device) -> None:
    """Write a run folder for each accumulation, straight and stopped half-way."""
    for accumulation in (1, 4):
        micro = 8 // world_size() // accumulation
        words = [*SETTINGS, "--batch.micro_batch_size", str(micro)]
        config = arguments.parse(tinyllama.Config, words, prog="worker", dry_run=tinyllama.DRY_RUN)
        config = tinyllama.stage(config, online=False)
        straight = folder / f"accumulation{accumulation}-straight"
        assert tinyllama.train(config, straight, device, rehearse_stop=False) == "finished"
        resumed = folder / f"accumulation{accumulation}-resumed"
        signals.install()
        assert tinyllama.train(config, resumed, device, rehearse_stop=True) == "rehearsed"
        if is_main_process():
            assert max(losses(resumed)) < 8, "it was not stopped"
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
