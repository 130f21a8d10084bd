"""The settings of every training script, and all settings of the language-model scripts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from train.engine.settings import (
    BatchSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    ShardCheckpointSettings,
    SourceSettings,
    TextEvaluationSettings,
    require,
)


@dataclass(kw_only=True)
class StagedPaths:
    """Where `make fetch` or `make run` put the run's inputs, under $SLUICE_DATASETS."""

    model: str | None = None
    tokenizer: str = ""
    train: str = ""
    validation: str = ""


@dataclass(kw_only=True)
class LoopSettings:
    """The settings of every training script besides its model and data."""

    max_steps: int = 1000
    """Optimizer steps in the whole run, over all its attempts."""
    seed: int = 42
    """Determines the initial weights, the order of the data and dropout."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: the strategy file's precision on a GPU, fp32 on a CPU. bf16 is autocast: the weights
    and the optimizer stay in fp32."""
    compile: bool = False
    """torch.compile: slow first step, then faster; needs a compiler."""
    log_every_steps: int = 10
    """Log a line of metrics every N steps."""
    export: bool = True
    """Export a Hugging Face model folder at the end."""
    timeout_s: int = 600
    """A collective that takes longer means a lost peer: the run ends instead of hanging."""

    def __post_init__(self) -> None:
        require(self.max_steps >= 1, f"max_steps: {self.max_steps} is not positive")
        require(
            self.log_every_steps >= 1, f"log_every_steps: {self.log_every_steps} is not positive"
        )
        require(0 <= self.seed < 2**32, f"seed: {self.seed} is not between 0 and 4294967295")
        require(self.timeout_s >= 1, f"timeout_s: {self.timeout_s} is not positive")


@dataclass(kw_only=True)
class TrainingConfig(LoopSettings):
    """All settings of a language-model training script."""

    reduce_dtype: Literal["auto", "fp32"] = "auto"
    """In what gradients travel between processes. auto: as `precision`; fp32: without rounding, for
    twice the traffic (docs/strategies.md)."""
    model: ModelSettings = field(default_factory=ModelSettings)
    data: SourceSettings
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    evaluation: TextEvaluationSettings = field(default_factory=TextEvaluationSettings)
    checkpoint: ShardCheckpointSettings = field(default_factory=ShardCheckpointSettings)
    staged: StagedPaths | None = None
    """Written by the set-up; not for the command line."""
    dry_run: bool = False
    """A few steps of the preset `tiny` on the embedded sample: train, stop, resume, export."""


@dataclass(kw_only=True)
class TextConfig(TrainingConfig):
    """All settings of a script that trains on text."""

    data: DataSettings = field(default_factory=DataSettings)
