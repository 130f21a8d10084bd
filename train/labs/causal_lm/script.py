"""Lab 2: fine-tune a pretrained language model on text, all of its weights or LoRA adapters.

    make dry-run JOB=causal_lm
    make run JOB=causal_lm ARGS="--method lora --data.train my-text/ --data.validation more.txt"

Texts from the same prompts and the perplexity of the whole validation text are measured before and
after the training, which is train/finetuning.py.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.engine import sampling, staging, tokenization, tuning
from train.engine.batches import Blocks
from train.engine.data import SAMPLES
from train.engine.errors import run_to_exit
from train.engine.once import staged_path
from train.engine.script import Script
from train.labs.causal_lm.settings import Config

if TYPE_CHECKING:
    import torch


# What the dry run is tuned on: text in another style than the sample that tinyllama trains on.
RECIPES = SAMPLES / "causal_lm"
# What --dry_run changes; the command line still overrides it.
DRY_RUN: dict[str, Any] = {
    "model": {"preset": "tiny"},
    "data": {"sequence_length": 64},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "optimizer": {"lr": 1e-2},
    "schedule": {"warmup_steps": 4},
    "evaluation": {"every_steps": 10, "max_tokens": 1024},
    "checkpoint": {"every_steps": 5},
    "sample": {"prompts": ["Heat the oven", "Stir the"], "max_new_tokens": 16},
    "max_steps": 20,
    "log_every_steps": 5,
}


def stage(config: Config, *, online: bool) -> Config:
    """Return `config` with its inputs staged; `make fetch` calls this with a network."""
    # Reported here and not after the wait in the queue, if the batch does not divide.
    config.batch.per_process(int(os.environ.get("SLUICE_WORLD_SIZE", "1")))
    data = config.data
    if config.dry_run and data.train is None:
        recipes = [str(RECIPES / name) for name in ("train.txt", "validation.txt")]
        data = replace(data, train=recipes[0], validation=recipes[1])
    staged = staging.stage(replace(config, data=data), online=online)

    model_folder = staged_path(staged.model) if staged.model else None
    tuning.check_adapters(config, model_folder)
    shape = staging.model_shape(config, model_folder)
    tokenizer = tokenization.load(staged_path(staged.tokenizer))
    sampling.check_fits(
        config.sample,
        sampling.documents(config.sample, tokenizer),
        int(shape.get("max_position_embeddings", 2048)),
    )
    return replace(config, staged=staged)


def train(config: Config, run_folder: Path, device: torch.device, *, rehearse_stop: bool) -> str:
    """Train to the end or until asked to stop; return finished, stopped or rehearsed."""
    from train.finetuning import TuningData, fine_tune

    assert config.staged is not None
    tokenizer_folder = staged_path(config.staged.tokenizer)
    model_folder = staged_path(config.staged.model) if config.staged.model else None
    sequence_length = staging.sequence_length(config, model_folder)
    data = TuningData(
        training=Blocks(staged_path(config.staged.train), sequence_length),
        validation=Blocks(staged_path(config.staged.validation), sequence_length),
        prompts=sampling.documents(config.sample, tokenization.load(tokenizer_folder)),
        next_command=f"make generate RUN= PROMPT={shlex.quote(config.sample.prompts[0])}",
    )
    model, weights = tuning.pretrained(config, tokenizer_folder)
    return fine_tune(config, model, weights, data, run_folder, device, rehearse_stop=rehearse_stop)


SCRIPT = Script(
    prog="train/labs/causal_lm/script.py",
    config_class=Config,
    dry_run=DRY_RUN,
    stage=stage,
    train=train,
)

if __name__ == "__main__":
    run_to_exit(SCRIPT.main)
