"""Lab 1: data parallelism with the Hugging Face Trainer, on news in four classes (AG News).

    make dry-run JOB=ag_news                       # two processes, embedded sample, no network
    make fetch JOB=ag_news && make run JOB=ag_news

Each process trains the whole model on its own rows of every batch; DDP averages the gradients.
Reads top to bottom. What is not the idea of this lab lives in train/engine.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runfolder.attempts import write_outcome
from runfolder.errors import UserError
from train.engine import signals
from train.engine.classification import labelled, scores
from train.engine.classification.datasettings import LabelledDataSettings
from train.engine.classification.labelled import StagedLabelled
from train.engine.data import SAMPLES
from train.engine.errors import run_to_exit
from train.engine.once import staged_path
from train.engine.schedule import lr_at
from train.engine.script import Script, only_under_ddp
from train.engine.settings import (
    BatchSettings,
    CheckpointSettings,
    EncoderSettings,
    EvaluationSettings,
    OptimizerSettings,
    ScheduleSettings,
)
from train.engine.story import say
from train.labs.ag_news.epochs import EpochSettings
from train.labs.ag_news.seeds import read_tests, sentence, summary, write_test

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from train.engine.metrics import Metrics
    from train.labs.ag_news.splits import Split, Splits
    from train.labs.ag_news.trainer import Start, TrainerCheckpoints

# Rows in a forward pass of an evaluation, of each process.
TEST_BATCH = 64
# What --dry_run changes; the command line still wins over it.
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


@dataclass(kw_only=True)
class Config(EpochSettings):
    """Tell classes of text apart with a pretrained encoder, trained by the Hugging Face Trainer."""

    run_folder: str = ""
    """Where checkpoints, metrics and the exported model go; $SLUICE_RUN_FOLDER when empty."""
    model: EncoderSettings = field(default_factory=EncoderSettings)
    data: LabelledDataSettings = field(default_factory=LabelledDataSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    staged: StagedLabelled | None = None
    """Written by the set-up; not for the command line."""


def stage(config: Config, *, online: bool) -> Config:
    """Return `config` with what it reads put in place, and its steps counted."""
    only_under_ddp("ag_news")
    # Said here rather than after the wait in a queue, if the batch does not divide.
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
    # Rank 0 looks: another node may see an older listing of a network file system.
    written = from_main_process(json.dumps(read_tests(run_folder, all_seeds, step=num_steps)))
    tests = {int(seed): found for seed, found in json.loads(written or "{}").items()}

    # ---- train, one seed after the other ----
    record = None
    if is_main_process():
        # The step that training goes on from is recorded again; the last of a tested seed is not.
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
            # What there is to do next: the real data, then the next chapter.
            real, chapter = "make fetch JOB=ag_news", "make dry-run JOB=causal_lm"
            reached["command"] = real if config.dry_run else chapter
            write_outcome(run_folder, outcome="finished", **reached)
        elif outcome == "stopped":
            name = signals.received() or "another rank's signal"
            say(f"stopped by {name} at step {step}; saved as {newest.name}")
            write_outcome(run_folder, outcome="stopped", reason=name, **reached)
    return outcome


@dataclass(frozen=True, kw_only=True)
class Training:
    """One of the trainings of a run."""

    config: Config
    run_folder: Path
    device: torch.device
    rows: Splits
    number: int
    """Its place among the run's trainings, one for each seed."""
    num_steps: int
    start: Start | None
    """The checkpoint of this training to go on from."""
    checkpoints: TrainerCheckpoints
    must_match: dict[str, Any]
    record: Metrics | None
    rehearse_at: int | None
    """The step of the run after which this process sends itself a signal."""


def new_model(config: Config, seed: int) -> PreTrainedModel:
    """Return the encoder with a new head, whose weights follow from the seed."""
    from train.labs.ag_news import classifier

    assert config.staged is not None
    classes = labelled.named(labelled.read(config.staged)[0], config.data.class_names)
    folder = staged_path(config.staged.model) if config.staged.model else None
    return classifier.load(folder, staged_path(config.staged.tokenizer), classes, seed)


def train_seed(training: Training) -> tuple[str, dict[str, Any]]:
    """Train with one seed, then test, once.

    Returns how it ended (finished, stopped, rehearsed), and what the test found.
    """
    from transformers import TrainingArguments

    from train.engine.distributed import gather_strings, is_main_process, rank, world_size
    from train.engine.strategy import uses_bf16
    from train.labs.ag_news import classifier
    from train.labs.ag_news.grouped import GroupedBatches
    from train.labs.ag_news.trainer import LabTrainer, PaddedRows, RowLoss
    from train.labs.ag_news.watch import Watch

    config, device, rows, start = training.config, training.device, training.rows, training.start
    seed, num_steps = config.seed + training.number, training.num_steps
    model = new_model(config, seed)
    bf16 = uses_bf16(config.precision, device)

    # ---- this process's share of each batch ----
    micro_batch_size, gradient_accumulation_steps = config.batch.per_process(world_size())
    batches = GroupedBatches(
        [len(ids) for ids in rows.training.ids],
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=micro_batch_size,
        num_steps=num_steps,
        seed=seed,
        rank=rank(),
        world_size=world_size(),
    )
    shares = gather_strings(batches.describe())
    if is_main_process():
        say(
            f"seed {seed}: {num_steps:,} steps, batch {world_size()} x {micro_batch_size} x "
            f"{gradient_accumulation_steps} rows, {'bf16' if bf16 else 'fp32'}"
        )
        say("\n".join(shares))

    # ---- the Trainer ----
    def predict(split: Split, *, may_stop: bool = True) -> np.ndarray | None:
        return classifier.predict(
            model, split.ids, batch_size=TEST_BATCH, device=device, bf16=bf16, may_stop=may_stop
        )

    loss, collate = RowLoss(), PaddedRows(model.config.pad_token_id or 0)
    watch = Watch(
        seed=seed,
        first_step=training.number * num_steps,
        num_steps=num_steps,
        global_batch_size=config.batch.global_batch_size,
        log_every_steps=config.log_every_steps,
        evaluate_every_steps=config.evaluation.every_steps,
        validation=(rows.classes, rows.validation.labels),
        predict=lambda may_stop: predict(rows.validation, may_stop=may_stop),
        loss=loss,
        collate=collate,
        device=device,
        record=training.record,
        line=start.line if start else {"step": training.number * num_steps},
        rehearse_at=training.rehearse_at,
    )
    arguments = TrainingArguments(
        output_dir=str(training.checkpoints.unpublished),
        max_steps=num_steps,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=config.optimizer.lr,
        adam_beta1=config.optimizer.beta1,
        adam_beta2=config.optimizer.beta2,
        adam_epsilon=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        bf16=bf16,
        torch_compile=config.compile,
        seed=seed,
        logging_steps=config.log_every_steps,
        logging_nan_inf_filter=False,  # It would show a loss that is not a number as a mean.
        save_steps=config.checkpoint.every_steps,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        # Without these two, two processes on CPUs train two copies that never meet.
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" else None,
        ddp_find_unused_parameters=False,
    )
    # Without bf16 it would take the launcher's word, which every file of configs/accelerate gives.
    arguments.mixed_precision = "bf16" if bf16 else "no"
    trainer = LabTrainer(
        model,
        arguments,
        list(zip(rows.training.ids, rows.training.labels, strict=True)),
        batches=batches,
        collate=collate,
        loss=loss,
        rate=lambda step: lr_at(step, peak_lr=1.0, max_steps=num_steps, schedule=config.schedule),
        checkpoints=training.checkpoints,
        state=lambda: {**training.must_match, "number": training.number, "line": watch.line},
        callback=watch,
    )
    trainer.train(resume_from_checkpoint=str(start.folder) if start else None)

    # ---- test ----
    probabilities_NC = None if watch.stopping else predict(rows.test)
    if probabilities_NC is None:
        return ("rehearsed" if watch.rehearsing else "stopped"), {}
    found = scores.score(rows.test.labels, probabilities_NC, rows.classes)
    if is_main_process():
        say(scores.table(found))
        if training.number == 0 and config.export:
            export = training.run_folder / "export"
            classifier.export(model, rows.tokenizer_folder, rows.max_length, export)
        write_test(training.run_folder, seed, num_steps, rows, found, probabilities_NC)
    return "finished", asdict(found)


SCRIPT = Script(
    prog="train/labs/ag_news/script.py",
    config_class=Config,
    dry_run=DRY_RUN,
    stage=stage,
    train=train,
)

if __name__ == "__main__":
    run_to_exit(SCRIPT.main)
