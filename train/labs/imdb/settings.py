"""The settings of lab 3."""

from __future__ import annotations

from dataclasses import dataclass, field

from runfolder.errors import UserError
from train.engine.classification.datasettings import LabelledDataSettings
from train.engine.classification.labelled import StagedLabelled
from train.engine.config import LoopSettings
from train.engine.settings import (
    BatchSettings,
    EncoderSettings,
    EvaluationSettings,
    OptimizerSettings,
    ScheduleSettings,
    ShardCheckpointSettings,
)
from train.labs.imdb.unfreezing import Freeze, UnfreezingSettings


@dataclass(kw_only=True)
class Config(LoopSettings):
    """Put a new head on a pretrained encoder; train the head, everything, or layer by layer."""

    run_folder: str = ""
    """Where checkpoints, metrics and the exported model go; $SLUICE_RUN_FOLDER when empty."""
    freeze: Freeze = "backbone"
    """backbone: only the head trains. none: everything trains. gradual: see `unfreezing.phases`."""
    model: EncoderSettings = field(default_factory=EncoderSettings)
    data: LabelledDataSettings = field(default_factory=LabelledDataSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    unfreezing: UnfreezingSettings = field(default_factory=UnfreezingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """A phase also ends with an evaluation."""
    checkpoint: ShardCheckpointSettings = field(default_factory=ShardCheckpointSettings)
    staged: StagedLabelled | None = None
    """Written by the set-up; not for the command line."""
    dry_run: bool = False
    """A few steps of a small random encoder on the embedded sample: train, stop, resume, test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile:
            raise UserError("compile: this lab does not support torch.compile; leave it out")
