"""Train a causal language model on text: TinyLlama on WikiText by default, any Llama on any text.

    make dry-run                              # two processes, a few steps, no network
    make fetch JOB=tinyllama && make run JOB=tinyllama NPROC=2

Reads top to bottom. What is not the idea of this script lives in train/engine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runfolder.attempts import write_outcome
from train.engine import signals, staging
from train.engine.batches import Blocks
from train.engine.config import TextConfig
from train.engine.errors import run_to_exit
from train.engine.once import staged_path
from train.engine.script import Script
from train.engine.story import say

if TYPE_CHECKING:
    import torch

# What --dry_run changes; the command line still overrides it.
DRY_RUN: dict[str, Any] = {
    "model": {"preset": "tiny"},
    "data": {"sequence_length": 64},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "optimizer": {"lr": 3e-3},
    "schedule": {"warmup_steps": 4},
    "evaluation": {"every_steps": 10},
    "checkpoint": {"every_steps": 5},
    "max_steps": 20,
    "log_every_steps": 5,
}


@dataclass(kw_only=True)
class Config(TextConfig):
    """Train a causal language model on text."""

    run_folder: str = ""
    """Where checkpoints, metrics and the exported model go; $SLUICE_RUN_FOLDER when empty."""


def stage(config: Config, *, online: bool) -> Config:
    """Return `config` with its inputs staged; `make fetch` calls this with a network."""
    # Reported here and not after the wait in the queue, if the batch does not divide.
    config.batch.per_process(int(os.environ.get("SLUICE_WORLD_SIZE", "1")))
    return replace(config, staged=staging.stage(config, online=online))


def train(config: Config, run_folder: Path, device: torch.device, *, rehearse_stop: bool) -> str:
    """Train to the end or until asked to stop; return finished, stopped or rehearsed."""
    import torch

    from train.engine import checkpoint, metrics, models, strategy
    from train.engine.distributed import is_main_process, world_size
    from train.engine.loss import TokenLoss, evaluate
    from train.engine.resume import restore
    from train.engine.step import take_step

    # ---- data ----
    assert config.staged is not None
    tokenizer_folder = staged_path(config.staged.tokenizer)
    model_folder = staged_path(config.staged.model) if config.staged.model else None
    sequence_length = staging.sequence_length(config, model_folder)
    training = Blocks(staged_path(config.staged.train), sequence_length)
    validation = Blocks(staged_path(config.staged.validation), sequence_length)
    global_batch_size = config.batch.global_batch_size
    micro_batch_size, gradient_accumulation_steps = config.batch.per_process(world_size())

    # ---- model, optimizer, resume ----
    accel = strategy.name_from_environment()
    bf16 = strategy.uses_bf16(config.precision, device.type)
    # Each process reads the weights that it will hold, not before.
    model, weights = models.plan(config, tokenizer_folder, config.seed)
    num_parameters = sum(p.numel() for p in model.parameters())
    flops_per_token = models.flops_per_token(model, sequence_length)
    checkpoints = checkpoint.Checkpoints(run_folder / "checkpoints", config.checkpoint)
    must_match = {
        "data": config.staged.train,
        "sequence_length": sequence_length,
        "seed": config.seed,
    }
    start = restore(checkpoints, model, must_match)
    step, position, line = start.step, start.position, start.line
    loss_module = TokenLoss(model, device, bf16)
    if config.compile:
        loss_module.compile_parts()
    wrapped = strategy.prepare(
        loss_module,
        config.optimizer,
        name=accel,
        device=device,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        resume=start.optimizer,
        source=start.weights or weights,
        reduce_dtype=config.reduce_dtype,
    )
    record = None
    if is_main_process():
        record = metrics.Metrics(run_folder, max_steps=config.max_steps, resume_step=step)
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        say(
            f"{accel}, {world_size()} x {device_name}, {'bf16' if bf16 else 'fp32'}: "
            f"{num_parameters:,} parameters, "
            f"{training.num_full:,} blocks of {sequence_length} tokens, batch "
            f"{world_size()} x {micro_batch_size} x {gradient_accumulation_steps} sequences"
        )
        say(
            f"resuming from {start.folder.name}, step {step}"
            if start.folder
            else "starting at step 0"
        )
    peak = metrics.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    timer = metrics.StepTimer()

    def save() -> None:
        state = {**must_match, "position": position, "line": line.copy()}
        state |= {"accel": accel, "world_size": world_size()}
        checkpoints.save(step, wrapped, state)

    # ---- train ----
    saved_step = step if start.folder else -1
    stopping = rehearsing = False
    while True:
        if step % config.evaluation.every_steps == 0 or step >= config.max_steps:
            found = evaluate(
                wrapped.module,
                validation,
                micro_batch_size=micro_batch_size,
                max_tokens=config.evaluation.max_tokens,
                device=device,
            )
            if found is None:
                stopping = True
                break
            line |= found.metrics()
        if record and (step % config.log_every_steps == 0 or "validation_loss" in line):
            record.write(line)
        if step >= config.max_steps:
            break

        done = take_step(
            wrapped,
            training,
            config,
            step=step,
            position=position,
            writing=checkpoints.writing,
        )
        step += 1
        position += global_batch_size
        timer.add(tokens=done.tokens, seconds=done.seconds, data_seconds=done.data_seconds)

        line = {"step": step, "loss": done.loss, "lr": done.lr, "grad_norm": done.grad_norm}
        line |= {"tokens": position * sequence_length, **metrics.memory(device)}
        if step % config.log_every_steps == 0 or step >= config.max_steps:
            line |= timer.take()
            if peak and "tokens_per_second" in line:
                line["mfu"] = line["tokens_per_second"] * flops_per_token / (peak * world_size())
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
    if is_main_process():
        assert record is not None
        newest = checkpoints.newest_folder()
        if stopping and step % config.log_every_steps == 0:
            record.write(line)
        record.close()
        if stopping:
            name = signals.received() or "another rank's signal"
            say(f"stopped by {name} at step {step}; saved as {newest.name}")
            outcome: dict[str, Any] = {"outcome": "stopped", "reason": name}
        else:
            if config.export:
                from train.export import export

                export(newest, tokenizer_folder, run_folder / "export")
            outcome = {"outcome": "finished", **timer.summary(), "metrics": line}
            outcome["command"] = 'make generate RUN= PROMPT="The cluster"'
        if not rehearsing or not stopping:
            write_outcome(run_folder, **outcome, step=step, checkpoint=newest.name)
    if stopping:
        return "rehearsed" if rehearsing else "stopped"
    return "finished"


SCRIPT = Script(
    prog="train/tinyllama.py", config_class=Config, dry_run=DRY_RUN, stage=stage, train=train
)

if __name__ == "__main__":
    run_to_exit(SCRIPT.main)
