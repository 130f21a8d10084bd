"""Lab 3: transfer learning. A new head on a pretrained encoder, for film reviews (IMDB).

    make dry-run JOB=imdb                          # two processes, embedded sample, no network
    make fetch JOB=imdb && make run JOB=imdb ARGS="--freeze gradual"

--freeze backbone: the encoder turns each text into a vector, once; a linear head trains on these.
--freeze none: everything trains from the first step. --freeze gradual: first the head, then also
the top layers, then deeper. Each is a list of phases (unfreezing.py), so that one loop serves
all three. Reads top to bottom; what is not the idea of this lab is in run.py and train/engine.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runfolder.attempts import write_outcome
from runfolder.checkpoints import folder_name
from runfolder.errors import UserError
from train.engine import signals
from train.engine.classification import labelled
from train.engine.data import SAMPLES
from train.engine.errors import run_to_exit
from train.engine.once import staged_path
from train.engine.presets import TINY_ENCODER_LAYERS
from train.engine.pretrained import ENCODER
from train.engine.script import Script, only_under_ddp
from train.engine.shape import read_shape
from train.engine.story import say
from train.labs.imdb import unfreezing
from train.labs.imdb.settings import Config
from train.labs.imdb.unfreezing import Phase

if TYPE_CHECKING:
    import torch

    from train.labs.imdb.run import Inputs, Run

# What --dry_run changes; the command line still overrides it.
DRY_RUN: dict[str, Any] = {
    "freeze": "gradual",
    "model": {"preset": "tiny"},
    "data": {"max_length": 64},
    "batch": {"global_batch_size": 16, "micro_batch_size": 4},
    "optimizer": {"lr": 2e-3},
    "schedule": {"warmup_steps": 4},
    "unfreezing": {"phases": "0:40 1:30 3:30", "head_lr": 1e-3},
    "evaluation": {"every_steps": 30},
    "checkpoint": {"every_steps": 10},
    "max_steps": 120,
    "log_every_steps": 10,
}


def stage(config: Config, *, online: bool) -> Config:
    """Return `config` with its inputs staged; `make fetch` calls this with a network."""
    only_under_ddp("imdb")
    # Reported here and not after the wait in the queue, if the batch or the phases do not fit.
    config.batch.per_process(int(os.environ.get("SLUICE_WORLD_SIZE", "1")))
    staged = labelled.stage(
        config.model,
        config.data,
        staged=config.staged,
        sample=SAMPLES / "imdb" if config.dry_run else None,
        online=online,
    )
    config = replace(config, staged=staged)
    phases_of(config)
    labelled.named(labelled.read(staged)[0], config.data.class_names)
    return config


def phases_of(config: Config) -> list[Phase]:
    """Return the phases of the run; together they have `max_steps` steps."""
    assert config.staged is not None
    num_layers = TINY_ENCODER_LAYERS
    if config.staged.model:
        shape = read_shape(staged_path(config.staged.model), ENCODER)
        num_layers = int(shape["num_hidden_layers"])
    phases = unfreezing.plan(
        config.freeze, config.unfreezing, max_steps=config.max_steps, num_blocks=num_layers + 1
    )
    shortest, warmup_steps = min(phase.steps for phase in phases), config.schedule.warmup_steps
    if warmup_steps >= shortest:
        raise UserError(
            f"schedule.warmup_steps: {warmup_steps} is not less than the {shortest} steps of a "
            "phase; give fewer, or a larger --max_steps"
        )
    return phases


# ---- train ----------------------------------------------------------------------------------


def train_phase(run: Run, phase: Phase) -> bool:
    """Train to the end of a phase; return False if a rank was asked to stop first."""
    from train.labs.imdb.phase_training import take_step
    from train.labs.imdb.run import (
        prepare_features,
        prepare_tokens,
        save,
        start_phase,
    )

    config = run.config
    training = start_phase(run, phase)
    # If no block trains, the vectors of the texts do not change from step to step.
    inputs = prepare_tokens(run) if phase.blocks else prepare_features(run)
    is_stopped = inputs is None
    while inputs and not is_stopped:
        # The last step of a phase is where the next begins; it is scored and logged once.
        if run.step > phase.first_step or run.step == 0:
            is_stopped = not log(run, inputs, is_end=run.step == phase.end)
        if is_stopped or run.step == phase.end:
            break
        done = take_step(
            training,
            inputs.of_rows,
            run.training.rows.labels,
            config.batch,
            config.schedule,
            step=run.step,
            seed=config.seed,
            writing=run.checkpoints.writing,
        )
        run.step += 1
        run.metrics_line = {"step": run.step, "loss": done.loss, "grad_norm": done.grad_norm}
        run.metrics_line |= training.learning_rates()
        run.metrics_line["rows"] = run.step * config.batch.global_batch_size
        run.metrics_line["rows_per_second"] = config.batch.global_batch_size / done.seconds
        if run.record:
            run.record.progress(run.step)
        if run.checkpoints.pending and not done.any_writing:
            run.checkpoints.finish()
        if run.rehearse_stop and run.step == max(1, config.max_steps // 2):
            run.is_rehearsed = True
            signals.rehearse()
        is_stopped = done.stop_asked
        if run.step % config.checkpoint.every_steps == 0:
            save(run, training)
    save(run, training)
    run.checkpoints.finish()
    return not is_stopped


def log(run: Run, inputs: Inputs, *, is_end: bool) -> bool:
    """Score the validation rows and write the step's metrics, when they are due.

    Returns False if a rank was asked to stop in the meantime.
    """
    from train.engine.classification.scores import mean_loss

    is_scored = is_end or run.step % run.config.evaluation.every_steps == 0
    if is_scored:
        vectors = inputs.validation_vectors()
        if vectors is None:
            return False
        probabilities_NC = run.model.probabilities(vectors)
        labels = run.validation.rows.labels
        right = sum(
            int(p.argmax()) == label for p, label in zip(probabilities_NC, labels, strict=True)
        )
        run.metrics_line |= {
            "validation_loss": mean_loss(labels, probabilities_NC.numpy()),
            "validation_accuracy": right / len(labels),
        }
    if run.record and (is_scored or run.step % run.config.log_every_steps == 0):
        run.record.write(run.metrics_line)
    return True


# ---- the lab, from start to end -------------------------------------------------------------


def train(config: Config, run_folder: Path, device: torch.device, *, rehearse_stop: bool) -> str:
    """Train to the end or until asked to stop; return finished, stopped or rehearsed."""
    from train.engine.distributed import is_main_process
    from train.engine.metrics import Metrics
    from train.labs.imdb.run import (
        evaluate,
        introduce,
        prepare,
        report,
        restore,
    )

    run = prepare(config, phases_of(config), run_folder, device)
    restore(run)
    run.rehearse_stop = rehearse_stop
    if is_main_process():
        run.record = Metrics(run_folder, max_steps=config.max_steps, resume_step=run.step)
        introduce(run)
    unfinished = [phase for phase in run.phases if phase.end >= run.step]
    # An attempt that is stopped does not start the next phases.
    is_trained = all(train_phase(run, phase) for phase in unfinished)
    probabilities_NC = evaluate(run) if is_trained else None
    if run.record:
        if probabilities_NC is not None:
            report(run, probabilities_NC)
        run.record.close()
    if probabilities_NC is not None:
        return "finished"
    if is_main_process():
        reason = signals.received() or "another rank's signal"
        newest = folder_name(run.step)
        say(f"stopped by {reason} at step {run.step}; saved as {newest}")
        if not run.is_rehearsed:
            write_outcome(
                run_folder, outcome="stopped", reason=reason, step=run.step, checkpoint=newest
            )
    return "rehearsed" if run.is_rehearsed else "stopped"


SCRIPT = Script(
    prog="train/labs/imdb/script.py", config_class=Config, dry_run=DRY_RUN, stage=stage, train=train
)

if __name__ == "__main__":
    run_to_exit(SCRIPT.main)
