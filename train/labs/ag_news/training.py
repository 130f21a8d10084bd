"""One training of lab 1: the Hugging Face Trainer over this process's share of each batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.engine.classification import labelled, scores
from train.engine.once import staged_path
from train.engine.schedule import lr_at
from train.engine.story import say
from train.labs.ag_news.seeds import write_test
from train.labs.ag_news.settings import Config

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from train.engine.metrics import Metrics
    from train.labs.ag_news.splits import Split, Splits
    from train.labs.ag_news.trainer import Start, TrainerCheckpoints

# Rows in a forward pass of an evaluation, of each process.
TEST_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Training:
    """One of the trainings of a run."""

    config: Config
    run_folder: Path
    device: torch.device
    rows: Splits
    number: int
    """Its number among the run's trainings, one for each seed."""
    num_steps: int
    start: Start | None
    """The checkpoint of this training to resume from."""
    checkpoints: TrainerCheckpoints
    must_match: dict[str, Any]
    record: Metrics | None
    rehearse_at: int | None
    """The step of the run after which this process sends itself a signal."""


def new_model(config: Config, seed: int) -> PreTrainedModel:
    """Return the encoder with a new head, whose weights depend only on the seed."""
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
    bf16 = uses_bf16(config.precision, device.type)

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
        optim="adamw_torch_fused",
        bf16=bf16,
        torch_compile=config.compile,
        seed=seed,
        logging_steps=config.log_every_steps,
        logging_nan_inf_filter=False,  # The filter would replace a NaN loss with a mean.
        save_steps=config.checkpoint.every_steps,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        # Without these two, two processes on CPUs train two separate copies.
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" else None,
        ddp_find_unused_parameters=False,
    )
    # Otherwise it would use the launcher's setting, which every file in configs/accelerate has.
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
