"""Lab 2: fine-tune a pretrained language model on text, all of it or by LoRA adapters.

    make dry-run JOB=causal_lm
    make run JOB=causal_lm ARGS="--method lora --data.train my-text/ --data.validation more.txt"

Text from the same prompts and the perplexity of the whole validation text are taken before the
training and after it. Reads top to bottom; one optimizer step is train/engine/step.py.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runfolder.attempts import write_outcome
from runfolder.errors import UserError
from runfolder.files import write_atomically
from train.engine import lora, signals, staging, tokenization
from train.engine.batches import Blocks
from train.engine.data import SAMPLES
from train.engine.errors import run_to_exit
from train.engine.lora import LoraSettings
from train.engine.once import staged_path
from train.engine.script import Script
from train.engine.settings import TrainingConfig
from train.engine.story import say
from train.labs.causal_lm import sampling
from train.labs.causal_lm.sampling import SampleSettings

if TYPE_CHECKING:
    import torch

    from train.engine.strategy.base import Strategy

# What the dry run is tuned to: text in another manner than the sample that tinyllama trains on.
RECIPES = SAMPLES / "causal_lm"
# What --dry_run changes; the command line still wins over it.
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


@dataclass(kw_only=True)
class Config(TrainingConfig):
    """Fine-tune a pretrained language model on text."""

    run_folder: str = ""
    """Where checkpoints, metrics, samples and the model go; $SLUICE_RUN_FOLDER when empty."""
    method: Literal["full", "lora"] = "full"
    """full: every weight trains. lora: the model is frozen, small adapters beside it train."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "full" and self.lora != LoraSettings():
            raise UserError(
                "lora: is read with method lora only; add --method lora, or leave it out"
            )
        if self.method == "lora" and self.model.preset and not self.dry_run:
            raise UserError(
                f"model.preset: {self.model.preset} has random weights, which adapters cannot mend;"
                " leave it out and give a trained model with --model.name"
            )


def stage(config: Config, *, online: bool) -> Config:
    """Return `config` with what it reads put in place; `make fetch` calls this with a network."""
    # Said here rather than after the wait in a queue, if the batch does not divide.
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
    model = _pretrained(config, tokenizer_folder)
    sizes = _sizes(model)
    flops = flops_per_token(model, sequence_length)
    checkpoints = checkpoint.Checkpoints(run_folder / "checkpoints", config.checkpoint)
    must_match = _must_match(config, sequence_length, model)
    start = restore(checkpoints, model, must_match)
    step, position, metrics_line = start.step, start.position, start.line
    before: View | None = start.state.get("before")
    wrapped = _wrap(model, config, device, start.optimizer)
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
            # Before the training and after it: all of the text, and what the prompts become.
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
            _compare(config, run_folder, before, view)
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


# ---- the parts that are this lab's own ----

# What is known of a model before or after: its step, its scores, and a text for each prompt.
View = dict[str, Any]
COMPARED = ("validation_perplexity", "bits_per_byte")


def _pretrained(config: Config, tokenizer_folder: Path) -> Any:
    """Return the model that is tuned, under LoRA frozen and with adapters."""
    from train.engine import models

    model = models.build(config, tokenizer_folder, config.seed)
    if config.method == "full":
        return model
    source = config.model
    return lora.add_adapters(
        model, config.lora, seed=config.seed, name=source.name, revision=source.revision
    )


def _sizes(model: Any) -> str:
    """Return how many of a model's parameters train, in words; before a strategy splits them."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%})"
    return sizes + lora.describe_adapted(model)


def _wrap(model: Any, config: Config, device: torch.device, resume: Any) -> Strategy:
    """Return the model under the strategy of the launcher's file, its optimizer beside it."""
    from train.engine import strategy
    from train.engine.distributed import world_size
    from train.engine.loss import TokenLoss

    loss = TokenLoss(model, device, strategy.uses_bf16(config.precision, device))
    if config.compile:
        loss.compile_parts()
    micro_batch_size, gradient_accumulation_steps = config.batch.per_process(world_size())
    return strategy.prepare(
        loss,
        config.optimizer,
        name=strategy.name_from_environment(),
        device=device,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        resume=resume,
    )


def _must_match(config: Config, sequence_length: int, model: Any) -> dict[str, Any]:
    """Return what a continued run must have as it was: its data, and what its weights belong to."""
    assert config.staged is not None
    found = {
        "method": config.method,
        "data": config.staged.train,
        # The text and the prompts of "before" are those of "after".
        "validation": config.staged.validation,
        "prompts": list(config.sample.prompts),
        "sequence_length": sequence_length,
        "seed": config.seed,
    }
    if config.method == "lora":
        is_folder = Path(config.model.name).is_dir()
        base = {"name": config.model.name, "preset": config.model.preset}
        base["revision"] = None if is_folder else config.model.revision
        base["staged"] = config.staged.model
        found |= lora.describe(config.lora)
        found |= {"base": base, "weights under the adapters": lora.base_sha256(model)}
    return found


def _compare(config: Config, run_folder: Path, before: View, after: View) -> None:
    """Print what the training changed, and keep the texts in samples.jsonl."""
    lines = []
    for number, prompt in enumerate(config.sample.prompts):
        say(f"prompt  {prompt}")
        for when, view in (("before", before), ("after", after)):
            text = view["texts"][number]
            say(f"{when:<7} {' '.join(text.split())}")
            lines.append({"when": when, "step": view["step"], "prompt": prompt, "text": text})
    write_atomically(
        run_folder / "samples.jsonl",
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
    )
    say(f"{'':<22}{'before':>10}{'after':>10}")
    for key in COMPARED:
        say(f"{key:<22}{before[key]:>10.4g}{after[key]:>10.4g}")


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
