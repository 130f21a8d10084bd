"""The model to fine-tune, with LoRA or as a whole, and what a resumed run must not change."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runfolder.errors import UserError
from train.engine import lora
from train.engine.config import TrainingConfig
from train.engine.lora import LoraSettings
from train.engine.sampling import SampleSettings

if TYPE_CHECKING:
    import torch

    from train.engine.source import Source
    from train.engine.strategy.base import Strategy


@dataclass(kw_only=True)
class TuningConfig(TrainingConfig):
    """The settings of a script that fine-tunes a pretrained language model."""

    run_folder: str = ""
    """Where checkpoints, metrics, samples and the model go; $SLUICE_RUN_FOLDER when empty."""
    method: Literal["full", "lora"] = "full"
    """full: all weights train. lora: the model is frozen, and small adapters train."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "full" and self.lora != LoraSettings():
            raise UserError(
                "lora: is only used with method lora; add --method lora, or leave it out"
            )
        if self.method == "lora" and self.model.preset and not self.dry_run:
            raise UserError(
                f"model.preset: {self.model.preset} has random weights, which adapters cannot fix; "
                "leave it out and give a trained model with --model.name"
            )


def check_adapters(config: TuningConfig, model_folder: Path | None) -> None:
    """Raise `UserError` if the model has no such layers for adapters; None is a preset."""
    if config.method != "lora":
        return
    if model_folder:
        lora.check(config.lora, lora.sides_of_folder(model_folder), config.model.name)
    elif config.model.preset:
        sides = lora.sides_of_preset(config.model.preset)
        lora.check(config.lora, sides, f"the preset {config.model.preset}")


def pretrained(config: TuningConfig, tokenizer_folder: Path) -> tuple[Any, Source | None]:
    """Return the model to fine-tune, and where its weights are, as `models.plan`.

    With LoRA it has its weights, frozen, and adapters.
    """
    from train.engine import models

    if config.method == "full":
        return models.plan(config, tokenizer_folder, config.seed)
    model = models.build(config, tokenizer_folder, config.seed)
    named = config.model
    adapted = lora.add_adapters(
        model, config.lora, seed=config.seed, name=named.name, revision=named.revision
    )
    return adapted, None


def sizes(model: Any) -> str:
    """Return how many of a model's parameters train, in words; before a strategy splits them."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    words = f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%})"
    return words + lora.describe_adapted(model)


def wrap(
    model: Any, config: TuningConfig, device: torch.device, resume: Any, source: Source | None
) -> Strategy:
    """Return the model and its optimizer under the strategy of the launcher's file."""
    from train.engine import strategy
    from train.engine.distributed import world_size
    from train.engine.loss import TokenLoss

    loss = TokenLoss(model, device, strategy.uses_bf16(config.precision, device.type))
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
        source=source,
        reduce_dtype=config.reduce_dtype,
    )


def must_match(config: TuningConfig, sequence_length: int, model: Any) -> dict[str, Any]:
    """Return what a resumed run must not change: its data, and what its weights belong to."""
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
