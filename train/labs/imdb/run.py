"""A run of lab 3: its rows, model and checkpoints; how it starts, resumes, and is reported."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runfolder.attempts import write_outcome
from runfolder.checkpoints import folder_name
from runfolder.errors import UserError
from train.engine import checkpoint_reader, encoders, strategy
from train.engine.checkpoint import Checkpoints
from train.engine.classification import labelled
from train.engine.classification.labelled import Labelled
from train.engine.classification.scores import score, table, write_predictions
from train.engine.distributed import is_main_process, world_size
from train.engine.metrics import Metrics
from train.engine.models import weights_sha256
from train.engine.once import staged_path
from train.engine.story import say
from train.labs.imdb import baseline, comparison
from train.labs.imdb.features import cached_features, embed_together
from train.labs.imdb.phase_training import PhaseTraining
from train.labs.imdb.settings import Config
from train.labs.imdb.transfer import Classifier, export, load_trained
from train.labs.imdb.unfreezing import Phase


@dataclass(kw_only=True)
class Texts:
    """The rows of a split, and their tokens, computed on first use."""

    rows: Labelled
    tokenizer_folder: Path
    max_length: int

    @cached_property
    def tokens(self) -> list[list[int]]:
        """The token ids of each row."""
        return encoders.tokenize(self.tokenizer_folder, self.rows.texts, self.max_length)


@dataclass(kw_only=True)
class Run:
    """What the parts of this lab share: settings, data, model, and how far the run is."""

    config: Config
    phases: list[Phase]
    folder: Path
    device: torch.device
    bf16: bool
    classes: list[str]
    training: Texts
    validation: Texts
    test: Texts
    model: Classifier
    encoder_sha256: str
    """Of the pretrained weights."""
    checkpoints: Checkpoints
    record: Metrics | None = None
    """On rank 0."""
    rehearse_stop: bool = False
    """A dry run sends itself the signal to stop, halfway."""
    is_rehearsed: bool = False
    resumed_from: Path | None = None
    step: int = 0
    saved_step: int | None = None
    metrics_line: dict[str, Any] = field(default_factory=lambda: {"step": 0})
    """The metrics of `step`; they may not be logged yet."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a phase reads: vectors computed before, or tokens that go through the encoder."""

    of_rows: Callable[[list[int]], tuple[torch.Tensor, ...]]
    """The inputs of training rows, for PhaseTraining.backward."""
    validation_vectors: Callable[[], torch.Tensor | None]
    """The vectors, (N, D), of the validation rows; collective. None: a rank was asked to stop."""


def prepare(config: Config, phases: list[Phase], run_folder: Path, device: torch.device) -> Run:
    """Read the rows and the pretrained encoder.

    Raises:
        UserError: the launcher's strategy is not ddp, or the encoder cannot be read.
    """
    accel = strategy.name_from_environment()
    if accel != "ddp":
        raise UserError(f"ACCEL={accel}: the lab imdb teaches ddp; leave ACCEL out")
    assert config.staged is not None
    tokenizer_folder = staged_path(config.staged.tokenizer)
    model_folder = staged_path(config.staged.model) if config.staged.model else None
    classes, rows, test = labelled.read(config.staged)
    training, validation = labelled.split_validation(
        rows, config.data.validation_fraction, config.seed
    )
    pretrained = encoders.load(model_folder, tokenizer_folder, config.seed)
    max_length = encoders.max_length(pretrained, config.data.max_length)

    def texts(rows: Labelled) -> Texts:
        return Texts(rows=rows, tokenizer_folder=tokenizer_folder, max_length=max_length)

    return Run(
        config=config,
        phases=phases,
        folder=run_folder,
        device=device,
        bf16=strategy.uses_bf16(config.precision, device.type),
        classes=labelled.named(classes, config.data.class_names),
        encoder_sha256=weights_sha256(pretrained),
        model=Classifier(pretrained, len(classes)).to(device),
        checkpoints=Checkpoints(run_folder / "checkpoints", config.checkpoint),
        training=texts(training),
        validation=texts(validation),
        test=texts(test),
    )


def prepare_features(run: Run) -> Inputs | None:
    """Return the frozen encoder's vectors of all rows, computed by all ranks, or cached.

    None: a rank was asked to stop.
    """
    vectors = {}
    started = time.perf_counter()
    for name, texts in {"training": run.training, "validation": run.validation}.items():
        found = cached_features(
            run.folder / "features" / name,
            run.model.encoder,
            texts.tokens,
            device=run.device,
            bf16=run.bf16,
        )
        if found is None:
            return None
        vectors[name] = found.to(run.device)
    if is_main_process():
        seconds = time.perf_counter() - started
        say(f"features of {sum(map(len, vectors.values())):,} rows are ready after {seconds:.1f} s")
    if run.step == 0:
        run.model.head.measure(vectors["training"])
        # Different processors may sum in another order; the head must be the same on all ranks.
        for statistic in (run.model.head.mean, run.model.head.deviation):
            torch.distributed.broadcast(statistic, src=0)
    return Inputs(
        of_rows=lambda rows: (vectors["training"][rows],),
        validation_vectors=lambda: vectors["validation"],
    )


def prepare_tokens(run: Run) -> Inputs:
    """Return the rows as tokens, for a phase in which the encoder changes."""
    tokens = run.training.tokens
    return Inputs(
        of_rows=lambda rows: tuple(
            part.to(run.device) for part in encoders.pad(tokens[i] for i in rows)
        ),
        validation_vectors=lambda: vectors_of(run, run.validation),
    )


def vectors_of(run: Run, texts: Texts) -> torch.Tensor | None:
    """Return the vectors, (N, D), by the encoder as it is now; None: a rank was asked to stop."""
    return embed_together(run.model.encoder, texts.tokens, device=run.device, bf16=run.bf16)


# ---- resume ---------------------------------------------------------------------------------


def must_match(run: Run) -> dict[str, Any]:
    """Return what a resumed run must not change: its step would mean something else."""
    config, phases = run.config, run.phases
    assert config.staged is not None
    return {
        "data": config.staged.train,
        "data.max_length": config.data.max_length,
        "data.validation_fraction": config.data.validation_fraction,
        "seed": config.seed,
        "encoder weights": run.encoder_sha256,
        "batch.global_batch_size": config.batch.global_batch_size,
        "freeze": config.freeze,
        # The last phase may become longer or shorter.
        "unfreezing.phases": [
            *([phase.blocks, phase.steps] for phase in phases[:-1]),
            [phases[-1].blocks],
        ],
    }


def restore(run: Run) -> None:
    """Load the weights, the step and its metrics from the newest checkpoint into `run`.

    Raises:
        UserError: it was made with other settings than `must_match` allows.
    """
    newest = run.checkpoints.newest()
    if newest is None:
        return
    state = checkpoint_reader.read_state(newest, must_match(run))
    load_trained(run.model, newest)
    run.resumed_from = newest
    run.step = run.saved_step = state["step"]
    run.metrics_line = state["metrics_line"]


def save(run: Run, training: PhaseTraining) -> None:
    """Start a checkpoint: what trains in this phase, its optimizer's moments, and the step."""
    if run.saved_step != run.step:
        state = {**must_match(run), "metrics_line": run.metrics_line.copy()}
        run.checkpoints.save(run.step, training, state)
        run.saved_step = run.step


def start_phase(run: Run, phase: Phase) -> PhaseTraining:
    """Unfreeze what trains in a phase; its optimizer resumes from the checkpoint, if any."""
    training = PhaseTraining(
        run.model,
        phase,
        run.config.optimizer,
        run.config.unfreezing,
        device=run.device,
        bf16=run.bf16,
    )
    if run.step > phase.first_step:
        # The phase has started already, which is only so after a resume.
        assert run.resumed_from is not None
        training.load_optimizer(
            run.step - phase.first_step, checkpoint_reader.reader(run.resumed_from)[0]
        )
    if run.record:
        trainable, total = training.counts()
        say(
            f"steps {phase.first_step} to {phase.end}: the head and {phase.blocks} of "
            f"{len(run.model.blocks())} blocks train, {trainable:,} of {total:,} parameters"
        )
    return training


def evaluate(run: Run) -> np.ndarray | None:
    """Return the probabilities (N, C) of the test rows; None: a rank was asked to stop.

    The test rows are read only here.
    """
    vectors = vectors_of(run, run.test)
    return None if vectors is None else run.model.probabilities(vectors).numpy()


def report(run: Run, probabilities_NC: np.ndarray) -> None:
    """Score the test rows against the baseline, and write the run's results; rank 0."""
    config, test, fitted = run.config, run.test.rows, run.training.rows
    baseline_NC = baseline.tfidf_baseline(fitted.texts, fitted.labels, test.texts)
    ours = score(test.labels, probabilities_NC, run.classes)
    base = score(test.labels, baseline_NC, run.classes)
    say(table(ours))
    named = {"TF-IDF, logistic regression": base, f"encoder, --freeze {config.freeze}": ours}
    say(comparison.side_by_side(named))
    predictions = run.folder / "predictions.jsonl"
    write_predictions(predictions, test.texts, test.labels, probabilities_NC, run.classes)
    if config.export:
        export(
            run.model,
            run.classes,
            run.test.max_length,
            run.test.tokenizer_folder,
            run.folder / "export",
        )
    write_outcome(
        run.folder,
        outcome="finished",
        step=run.step,
        checkpoint=folder_name(run.step),
        metrics=run.metrics_line
        | comparison.flat(ours, "test")
        | comparison.flat(base, "baseline"),
        command="make fetch JOB=imdb" if config.dry_run else "make dry-run JOB=rag",
    )


def introduce(run: Run) -> None:
    """Print what is trained, and on which rows."""
    micro, accumulation = run.config.batch.per_process(world_size())
    for name in ("training", "validation", "test"):
        rows: Labelled = getattr(run, name).rows
        counts = Counter(rows.labels)
        balance = ", ".join(
            f"{class_name} {counts[number]:,} ({counts[number] / len(rows):.1%})"
            for number, class_name in enumerate(run.classes)
        )
        say(f"{len(rows):,} {name} rows: {balance}")
    say(f"ddp, batch {world_size()} x {micro} x {accumulation} rows, {run.config.max_steps} steps")
    say(f"resuming from {run.resumed_from.name}" if run.resumed_from else "starting at step 0")
