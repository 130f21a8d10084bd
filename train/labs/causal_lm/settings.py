"""The settings of lab 2."""

from __future__ import annotations

from dataclasses import dataclass

from train.engine.config import TextConfig
from train.engine.tuning import TuningConfig


@dataclass(kw_only=True)
class Config(TuningConfig, TextConfig):
    """Fine-tune a pretrained language model on text."""
