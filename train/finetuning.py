"""Fine-tuning, step by step: scores and texts before and after, checkpoints, stop and resume.

What the labs on text and on conversations share; one optimizer step is train/engine/step.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from runfolder.attempts import write_outcome
from train.engine import checkpoint, metrics, sampling, signals, tuning
from train.engine.batches import Rows
from train.engine.comparison import COMPARED, View, compare
from train.engine.distributed import is_main_process, world_size
from train.engine.loss import evaluate
from train.engine.models import flops_per_token
from train.engine.once import staged_path
from train.engine.resume import restore
from train.engine.source import Source
from train.engine.step import take_step
from train.engine.story import say
from train.engine.tuning import TuningConfig
from train.export import export


@dataclass(frozen=True, kw_only=True)
class TuningData:
    """What a lab trains on, and what it shows of the result."""

    training: Rows
    validation: Rows
    prompts: sampling.Prompts
    next_command: str
    """What to try with the finished run."""
    must_match: dict[str, Any] = field(default_factory=dict)
    """What a resumed run must not change, besides what all labs have; checked first."""


def fine_tune(
    config: TuningConfig,
    model: PreTrainedModel,
    weights: Source | None,
    data: TuningData,
    run_folder: Path,
    device: torch.device,
    *,
    rehearse_stop: bool,
) -> str:
    """Train to the end or until asked to stop; return finished, stopped or rehearsed.

    `weights`: where those of `model` are, if it has none yet.
    """
    assert config.staged is not None
    tokenizer_folder = staged_path(config.staged.tokenizer)
    training, validation = data.training, data.validation
    sequence_length = training.sequence_length

    # ---- resume, optimizer ----
    sizes = tuning.sizes(model)
    flops = flops_per_token(model, sequence_length) * training.positions_per_target
    checkpoints = checkpoint.Checkpoints(run_folder / "checkpoints", config.checkpoint)
    must_match = data.must_match | tuning.must_match(config, sequence_length, model)
    start = restore(checkpoints, model, must_match)
    step, position, metrics_line = start.step, start.position, start.line
    tokens = metrics_line.get("tokens", 0)
    before: View | None = start.state.get("before")
    wrapped = tuning.wrap(model, config, device, start.optimizer, start.weights or weights)
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
                wrapped.module, data.prompts, config.sample, seed=config.seed, device=device
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
        tokens += int(done.tokens)
        metrics_line |= {"tokens": tokens, **metrics.memory(device)}
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
            compare(config.sample.prompts, run_folder, before, view)
            if config.export:
                export(newest, tokenizer_folder, run_folder / "export")
            metrics_line |= {f"{key}_before": before[key] for key in COMPARED}
            outcome = {"outcome": "finished", **timer.summary(), "metrics": metrics_line}
            outcome["command"] = data.next_command
        if not (rehearsing and stopping):
            write_outcome(run_folder, **outcome, step=step, checkpoint=newest.name)
    if stopping:
        return "rehearsed" if rehearsing else "stopped"
    return "finished"
