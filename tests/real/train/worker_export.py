"""Trains, is stopped, resumes and exports as the script does, and tells what is in memory then.

Ranks(ACCEL, 2, "tests.real.train.worker_export", MODEL_FOLDER, RUN_FOLDER, GATHERED_FILE)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from train import tinyllama
from train.engine import arguments, signals, strategy
from train.engine.distributed import init_distributed, is_main_process
from train.engine.errors import run_to_exit
from train.engine.strategy.base import Strategy


def main(argv: list[str]) -> int:
    """Train under this launch's strategy, and gather the weights by other means than ours."""
    model_folder, run_folder, gathered_file = argv
    words = ["--dry_run", "--model.preset", "null", "--model.name", model_folder]
    words += ["--data.sequence_length", "32", "--max_steps", "6", "--evaluation.max_tokens", "320"]
    config = arguments.parse(tinyllama.Config, words, prog="worker", dry_run=tinyllama.DRY_RUN)
    config = tinyllama.stage(config, online=False)
    device = init_distributed()

    prepared: list[Strategy] = []
    prepare = strategy.prepare

    def remember(*positional: Any, **named: Any) -> Strategy:
        prepared.append(prepare(*positional, **named))
        return prepared[-1]

    strategy.prepare = remember
    signals.install()
    assert tinyllama.train(config, Path(run_folder), device, rehearse_stop=True) == "rehearsed"
    signals.forget_rehearsal()
    assert tinyllama.train(config, Path(run_folder), device, rehearse_stop=False) == "finished"
    name = strategy.name_from_environment()
    weights = gather(prepared[-1].module, name)
    if is_main_process():
        torch.save((name, weights), gathered_file)
    return 0


def gather(module: Any, name: str) -> dict[str, torch.Tensor]:
    """Return the full weights by what DeepSpeed and torch themselves offer, not by ours."""
    if name == "zero3":
        import deepspeed

        parameters = dict(module.module.named_parameters())
        # DeepSpeed leaves parameters of less than 100,000 numbers whole between the steps.
        assert sum(not p.ds_persist for p in parameters.values()) == 7, "too little is split"
        found = {}
        for key, parameter in parameters.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                found[key] = parameter.detach().clone()
        return found

    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    for key, parameter in module.named_parameters():
        assert parameter.to_local().numel() < parameter.numel(), f"{key} is not split"
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))


if __name__ == "__main__":
    run_to_exit(main)
