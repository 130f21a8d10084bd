"""Lab 1: data parallelism with the Hugging Face Trainer, on news in four classes (AG News).

    make dry-run JOB=ag_news                       # two processes, embedded sample, no network
    make fetch JOB=ag_news && make run JOB=ag_news

Each process trains the whole model on its own rows of every batch; DDP averages the gradients.
Reads top to bottom. What is not the idea of this lab lives in train/engine.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runfolder.attempts import write_outcome
from runfolder.errors import UserError
from train.engine import signals
from train.engine.classification import labelled
from train.engine.data import SAMPLES
from train.engine.errors import run_to_exit
from train.engine.script import Script, only_under_ddp
from train.engine.story import say
from train.labs.ag_news.seeds import read_tests, sentence, summary
from train.labs.ag_news.settings import Config
from train.labs.ag_news.training import Training, new_model, train_seed

if TYPE_CHECKING:
    import torch


# What --dry_run changes; the command line still overrides it.
DRY_RUN: dict[str, Any] = {
    "model": {"preset": "tiny"},
    "data": {"max_length": 64, "validation_fraction": 0.2},
    "batch": {"global_batch_size": 16, "micro_batch_size": 4},
    "optimizer": {"lr": 3e-3},
    "schedule": {"warmup_steps": 4},
    "evaluation": {"every_steps": 15},
    "checkpoint": {"every_steps": 10},
    "max_steps": 60,
    "log_every_steps": 5,
}


def stage(config: Config, *, online: bool) -> Config:
    """Return `config` with its inputs staged and its steps counted."""
    only_under_ddp("ag_news")
    # Reported here and not after the wait in the queue, if the batch does not divide.
    config.batch.per_process(int(os.environ.get("SLUICE_WORLD_SIZE", "1")))
    sample = SAMPLES / "ag_news" if config.dry_run else None
    staged = labelled.stage(
        config.model, config.data, staged=config.staged, sample=sample, online=online
    )
    classes, rows, _ = labelled.read(staged)
    labelled.named(classes, config.data.class_names)
    training, _ = labelled.split_validation(rows, config.data.validation_fraction, config.seed)
    max_steps = config.count_steps(len(training), config.batch.global_batch_size)
    return replace(config, staged=staged, max_steps=max_steps, num_epochs=None)


def train(config: Config, run_folder: Path, device: torch.device, *, rehearse_stop: bool) -> str:
    """Train to the end or until asked to stop; return finished, stopped or rehearsed."""
    import torch

    from train.engine import metrics, strategy
    from train.engine.distributed import from_main_process, is_main_process, world_size
    from train.labs.ag_news import splits
    from train.labs.ag_news.trainer import TrainerCheckpoints

    accel = strategy.name_from_environment()
    if accel != "ddp":
        raise UserError(f"ACCEL={accel}: this lab teaches ddp; leave ACCEL out")

    # ---- data ----
    assert config.staged is not None
    model = new_model(config, config.seed)
    rows = splits.read(config.staged, config.data, model, config.seed)

    # ---- resume ----
    num_steps = config.max_steps // config.num_seeds
    all_seeds = range(config.seed, config.seed + config.num_seeds)
    checkpoints = TrainerCheckpoints(run_folder / "checkpoints", config.checkpoint)
    must_match: dict[str, Any] = {
        "data": config.staged.train,
        "max_length": rows.max_length,
        "data.validation_fraction": config.data.validation_fraction,
        "global_batch_size": config.batch.global_batch_size,
        "seed": config.seed,
        "num_seeds": config.num_seeds,
    }
    if config.num_seeds > 1:
        must_match["steps of a seed"] = num_steps
    start = checkpoints.restore(must_match)
    # Rank 0 reads: another node may see an older listing of a network file system.
    written = from_main_process(json.dumps(read_tests(run_folder, all_seeds, step=num_steps)))
    tests = {int(seed): found for seed, found in json.loads(written or "{}").items()}

    # ---- train, one seed after the other ----
    record = None
    if is_main_process():
        # The step that training resumes from is recorded again; the last of a tested seed is not.
        resume_step = max(start.step, len(tests) * num_steps + 1 if tests else 0)
        record = metrics.Metrics(run_folder, max_steps=config.max_steps, resume_step=resume_step)
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        num_parameters = sum(p.numel() for p in model.parameters())
        say(f"{accel}, {world_size()} x {device_name}: {num_parameters:,} parameters")
        say(rows.describe())
        say(f"resuming from {start.folder.name}" if start.folder else "starting at step 0")
    outcome = "finished"
    for number, seed in enumerate(all_seeds):
        if seed in tests:
            continue
        training = Training(
            config=config,
            run_folder=run_folder,
            device=device,
            rows=rows,
            number=number,
            num_steps=num_steps,
            start=start if start.folder and start.number == number else None,
            checkpoints=checkpoints,
            must_match=must_match,
            record=record,
            rehearse_at=max(1, config.max_steps // 2) if rehearse_stop else None,
        )
        outcome, tests[seed] = train_seed(training)
        if outcome != "finished":
            break

    # ---- finish ----
    if is_main_process():
        assert record is not None
        record.close()
        newest = checkpoints.newest_folder()
        step = int(newest.name.removeprefix("step-"))
        reached: dict[str, Any] = {"step": step, "checkpoint": newest.name}
        if outcome == "finished":
            say(sentence(tests))
            reached["metrics"] = summary(tests)
            # What to do next: the real data, then the next chapter.
            real, chapter = "make fetch JOB=ag_news", "make dry-run JOB=causal_lm"
            reached["command"] = real if config.dry_run else chapter
            write_outcome(run_folder, outcome="finished", **reached)
        elif outcome == "stopped":
            name = signals.received() or "another rank's signal"
            say(f"stopped by {name} at step {step}; saved as {newest.name}")
            write_outcome(run_folder, outcome="stopped", reason=name, **reached)
    return outcome


SCRIPT = Script(
    prog="train/labs/ag_news/script.py",
    config_class=Config,
    dry_run=DRY_RUN,
    stage=stage,
    train=train,
)

if __name__ == "__main__":
    run_to_exit(SCRIPT.main)
