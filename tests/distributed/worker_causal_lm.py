"""Tunes in one launch, under every strategy, all that test_causal_lm compares.

accelerate launch ... -m tests.distributed.worker_causal_lm FOLDER
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed import strategies
from train.engine import arguments, signals
from train.engine.errors import run_to_exit
from train.labs import causal_lm

# test_trajectories has every strategy with full weights.
FULL = ("ddp", "zero3")
# At the dry run's rate, of adapters, the first steps of all weights blow up the last bits.
LEARNING_RATE = {"full": ["--optimizer.lr", "2e-3"], "lora": []}
SETTINGS = [
    *("--dry_run", "--max_steps", "4", "--log_every_steps", "1", "--sample.max_new_tokens", "4"),
    *("--evaluation.every_steps", "2", "--checkpoint.every_steps", "2"),
    *("--schedule.warmup_steps", "0"),
]


def main(argv: list[str]) -> int:
    """Write a run folder for each strategy and method, all of them stopped half-way."""
    folder = Path(argv[0])
    # The first as a user runs it; the script makes the process group, and the rest goes on in it.
    words = [*SETTINGS, "--method", "lora", "--run_folder", str(folder / "ddp-lora")]
    assert causal_lm.SCRIPT.main(words) == 0
    device = torch.device("cpu")
    for accel in strategies.each():
        for method in ("full", "lora"):
            run = folder / f"{accel}-{method}"
            if run.exists() or (method == "full" and accel not in FULL):
                continue
            config = arguments.parse(
                causal_lm.Config,
                [*SETTINGS, "--method", method, "--export", "false", *LEARNING_RATE[method]],
                prog="worker",
                dry_run=causal_lm.DRY_RUN,
            )
            config = causal_lm.stage(config, online=False)
            signals.forget_rehearsal()
            assert causal_lm.train(config, run, device, rehearse_stop=True) == "rehearsed"
            signals.forget_rehearsal()
            assert causal_lm.train(config, run, device, rehearse_stop=False) == "finished"
    return 0


if __name__ == "__main__":
    run_to_exit(main)
