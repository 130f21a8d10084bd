"""The settings of lab 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from runfolder.errors import UserError
from train.engine.config import TrainingConfig
from train.engine.lora import LoraSettings
from train.labs.causal_lm.sampling import SampleSettings


@dataclass(kw_only=True)
class Config(TrainingConfig):
    """Fine-tune a pretrained language model on text."""

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
