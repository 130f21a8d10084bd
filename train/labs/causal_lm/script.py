"""Lab 2: fine-tune a pretrained language model on text, all of its weights or LoRA adapters.

    make dry-run JOB=causal_lm
    make run JOB=causal_lm ARGS="--method lora --data.train my-text/ --data.validation more.txt"

Texts from the same prompts and the perplexity of the whole validation text are measured before and
after the training. Reads top to bottom; one optimizer step is train/engine/step.py.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runfolder.attempts import write_outcome
from train.engine import lora, signals, staging, tokenization
from train.engine.batches import Blocks
from train.engine.data import SAMPLES
from train.engine.errors import run_to_exit
from train.engine.once import staged_path
from train.engine.script import Script
from train.engine.story import say
from train.labs.causal_lm import sampling, tuning
from train.labs.causal_lm.comparison import COMPARED, View, compare
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
    if config.method == "lora" and model_folder:
        lora.check(config.lora, lora.sides_of_folder(model_folder), config.model.name)
    elif config.method == "lora" and config.model.preset:
        sides = lora.sides_of_preset(config.model.preset)
        lora.check(config.lora, sides, f"the preset {config.model.preset}")
    shape = staging.model_shape(config, model_folder)
    sampling.check_fits(
        config.sample,
        tokenization.load(staged_path(staged.tokenizer)),
        int(shape.get("max_position_embeddings", 2048)),
    )
    return replace(config, staged=staged)


def train(config: Config, run_folder: Path, device: torch.device, *, rehearse_stop: bool) -> str:
    """Train to the end or until asked to stop; return finished, stopped or rehearsed."""
    import torch

    from train.engine import checkpoint, metrics
    from train.engine.distributed import is_main_process, world_size
    from train.engine.loss import evaluate
    from train.engine.models import flops_per_token
    from train.engine.resume import restore
    from train.engine.step import take_step
    from train.export import export

    # ---- data ----
    assert config.staged is not None
    tokenizer_folder = staged_path(config.staged.tokenizer)
    loaded_tokenizer = tokenization.load(tokenizer_folder)
    model_folder = staged_path(config.staged.model) if config.staged.model else None
    sequence_length = staging.sequence_length(config, model_folder)
    training = Blocks(staged_path(config.staged.train), sequence_length)
    validation = Blocks(staged_path(config.staged.validation), sequence_length)

    # ---- model, resume, optimizer ----
    model = tuning.pretrained(config, tokenizer_folder)
    sizes = tuning.sizes(model)
    flops = flops_per_token(model, sequence_length)
    checkpoints = checkpoint.Checkpoints(run_folder / "checkpoints", config.checkpoint)
    must_match = tuning.must_match(config, sequence_length, model)
    start = restore(checkpoints, model, must_match)
    step, position, metrics_line = start.step, start.position, start.line
    before: View | None = start.state.get("before")
    wrapped = tuning.wrap(model, config, device, start.optimizer)
    record = None
    if is_main_process():
        record = metrics.Metrics(run_folder, max_steps=config.max_steps, resume_step=step)
        batch = (world_size(), wrapped.micro_batch_size, wrapped.gradient_accumulation_steps)
        say(
            f"{config.method}: {sizes}; {training.num_full:,} blocks of {sequence_length} tokens, "
            f"batch {' x '.join(map(str, batch))} sequences"
        )
        say(f"resuming from {start.folder.name}" if start.folder else "starting at step 0")
    peak = metrics.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    timer = metrics.StepTimer()
    size = wrapped.micro_batch_size
    score = partial(evaluate, wrapped.module, validation, micro_batch_size=size, device=device)

    def save() -> None:
        state = {**must_match, "position": position, "line": metrics_line.copy(), "before": before}
        checkpoints.save(step, wrapped, state | {"world_size": world_size()})

    # ---- train ----
    saved_step = step if start.folder else -1
    stopping = rehearsing = False
    view: View | None = None
    while True:
        if step == 0 or step >= config.max_steps:
            # Before and after the training: all of the text, and the texts from the prompts.
            scores = score(max_tokens=None)
            texts = sampling.continue_prompts(
                wrapped.module, config.sample, loaded_tokenizer, seed=config.seed, device=device
            )
            if scores is None or texts is None:
                stopping = True
                break
            metrics_line |= scores.metrics()
            view = {"step": step, **scores.metrics(), "texts": texts}
            before = before or view
        elif step % config.evaluation.every_steps == 0:
            scores = score(max_tokens=config.evaluation.max_tokens)
            if scores is None:
                stopping = True
                break
            metrics_line |= scores.metrics()
        if record and (step % config.log_every_steps == 0 or "validation_loss" in metrics_line):
            record.write(metrics_line)
        if step >= config.max_steps:
            break

        done = take_step(
            wrapped, training, config, step=step, position=position, writing=checkpoints.writing
        )
        step += 1
        position += config.batch.global_batch_size
        timer.add(tokens=done.tokens, seconds=done.seconds, data_seconds=done.data_seconds)
        metrics_line = {"step": step, "loss": done.loss, "lr": done.lr, "grad_norm": done.grad_norm}
        metrics_line |= {"tokens": position * sequence_length, **metrics.memory(device)}
        if step % config.log_every_steps == 0 or step >= config.max_steps:
            metrics_line |= timer.take()
            if peak and "tokens_per_second" in metrics_line:
                rate = metrics_line["tokens_per_second"] / world_size()
                metrics_line["mfu"] = rate * flops / peak
        if record:
            record.progress(step)
        if rehearse_stop and step == max(1, config.max_steps // 2):
            rehearsing = True
            signals.rehearse()
        stopping = done.stop_asked
        if checkpoints.pending and not done.any_writing:
            checkpoints.finish()
        if stopping or step % config.checkpoint.every_steps == 0 or step >= config.max_steps:
            save()
            saved_step = step
        if stopping:
            break

    # ---- finish ----
    if saved_step != step:
        save()
    checkpoints.finish()
    if record:
        if stopping and step % config.log_every_steps == 0:
            record.write(metrics_line)
        record.close()
        newest = checkpoints.newest_folder()
        if stopping:
            name = signals.received() or "another rank's signal"
            say(f"stopped by {name} at step {step}; saved as {newest.name}")
            outcome: dict[str, Any] = {"outcome": "stopped", "reason": name}
        else:
            assert before is not None and view is not None
            compare(config, run_folder, before, view)
            if config.export:
                export(newest, tokenizer_folder, run_folder / "export")
            metrics_line |= {f"{key}_before": before[key] for key in COMPARED}
            outcome = {"outcome": "finished", **timer.summary(), "metrics": metrics_line}
            outcome["command"] = _next_command(config)
        if not (rehearsing and stopping):
            write_outcome(run_folder, **outcome, step=step, checkpoint=newest.name)
    if stopping:
        return "rehearsed" if rehearsing else "stopped"
    return "finished"


def _next_command(config: Config) -> str:
    return f"make generate RUN= PROMPT={shlex.quote(config.sample.prompts[0])}"


SCRIPT = Script(
    prog="train/labs/causal_lm/script.py",
    config_class=Config,
    dry_run=DRY_RUN,
    stage=stage,
    train=train,
)

if __name__ == "__main__":
    run_to_exit(SCRIPT.main)
