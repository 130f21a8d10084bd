"""The settings of lab 1."""

from __future__ import annotations

from dataclasses import dataclass, field

from train.engine.classification.datasettings import LabelledDataSettings
from train.engine.classification.labelled import StagedLabelled
from train.engine.settings import (
    BatchSettings,
    CheckpointSettings,
    EncoderSettings,
    EvaluationSettings,
    OptimizerSettings,
    ScheduleSettings,
)
from train.labs.ag_news.epochs import EpochSettings


@dataclass(kw_only=True)
class Config(EpochSettings):
    """Classify texts with a pretrained encoder, trained by the Hugging Face Trainer."""

    run_folder: str = ""
    """Where checkpoints, metrics and the exported model go; $SLUICE_RUN_FOLDER when empty."""
    model: EncoderSettings = field(default_factory=EncoderSettings)
    data: LabelledDataSettings = field(default_factory=LabelledDataSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    staged: StagedLabelled | None = None
    """Written by the set-up; not for the command line."""
