"""The settings that the training scripts share; each validates itself.

Nothing here imports torch: a wrong setting is reported before anything heavy is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from runfolder.errors import UserError, did_you_mean
from train.engine.presets import PRESETS


def require(holds: bool, message: str) -> None:
    """Raise `UserError` with `message` unless `holds`."""
    if not holds:
        raise UserError(message)


@dataclass(kw_only=True)
class ModelSettings:
    """The model to train."""

    PATHS = ("name", "tokenizer")
    """The settings that may be a path, which `make run` makes absolute."""

    name: str = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    """A hub id (owner/name), or a folder that holds a Hugging Face model."""
    revision: str | None = "fe8a4ea1ffedaf415f4da2f062534de366a451e6"
    """The commit of the hub id; not used for a folder."""
    preset: str | None = None
    """Start from random weights instead of `name`: tiny, 15m, 110m or tinyllama-1.1b."""
    tokenizer: str | None = None
    """A tokenizer folder, a tokenizer.json or a tokenizer.model. Default: the model's own; for a
    preset, one trained on the training text."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a fifth slower, much less memory."""

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise UserError(
                f"model.preset: '{self.preset}' is not a preset"
                + did_you_mean(self.preset, PRESETS)
            )
        require(bool(self.name), "model.name: is empty; give a hub id or a folder")


@dataclass(kw_only=True)
class EncoderSettings:
    """A pretrained encoder, which turns a text into one vector."""

    PATHS = ("name",)

    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    """A hub id (owner/name), or a folder that holds a Hugging Face encoder."""
    revision: str | None = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
    """The commit of the hub id; not used for a folder."""
    preset: Literal["tiny"] | None = None
    """Start from small random weights instead of `name`, with a tokenizer trained on the text."""

    def __post_init__(self) -> None:
        require(bool(self.name), "model.name: is empty; give a hub id or a folder")


@dataclass(kw_only=True)
class SourceSettings:
    """Where the training and the validation data come from."""

    PATHS: ClassVar[tuple[str, ...]] = ("train", "validation")

    name: str | None
    """A dataset's hub id (owner/name); `make fetch` stages it."""
    config: str | None = None
    """The dataset's configuration."""
    revision: str | None = None
    """The commit of the dataset."""
    train: str | None = None
    """Local data instead of `name`: a file or a folder; docs/data.md lists the formats."""
    validation: str | None = None
    """Local data to evaluate on."""
    sequence_length: int | None = None
    """Tokens in a block; default: the model's context, at most 2048."""

    def __post_init__(self) -> None:
        if self.sequence_length is not None:
            require(
                2 <= self.sequence_length <= 1_048_576,
                f"data.sequence_length: {self.sequence_length} is not between 2 and 1048576",
            )
        require(
            self.train is not None or bool(self.name),
            "data.name: is empty; give a dataset's hub id, or data.train",
        )


@dataclass(kw_only=True)
class DataSettings(SourceSettings):
    """The training and the validation text; `validation` is required with `train`."""

    name: str | None = "Salesforce/wikitext"
    config: str | None = "wikitext-2-raw-v1"
    revision: str | None = "b08601e04326c79dfdd32d625aee71d232d685c3"
    text_column: str = "text"
    """The column with the text, in files or in the hub dataset."""
    join_rows: bool = False
    """Rows are lines of one running text (as in WikiText), not separate documents."""
    parse_special_tokens: bool = False
    """Tokenize `</s>` and the like in the text as special tokens. By default they are text, as in
    HTML, except for the tokens that the model's chat template writes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.train is None) == (self.validation is None),
            f"data.{'train' if self.validation is None else 'validation'}: is given without "
            f"data.{'validation' if self.validation is None else 'train'}; give both, so that "
            "local text is not mixed with a dataset of the hub",
        )


@dataclass(kw_only=True)
class BatchSettings:
    """How many sequences make a step. The trajectory depends only on `global_batch_size`."""

    global_batch_size: int = 16
    """Sequences in an optimizer step, over all processes and micro batches."""
    micro_batch_size: int | None = None
    """Sequences in one forward pass of one process; default: the largest that divides, up to 8."""

    def __post_init__(self) -> None:
        for setting in ("global_batch_size", "micro_batch_size"):
            value = getattr(self, setting)
            require(value is None or value >= 1, f"batch.{setting}: {value} is not positive")

    def per_process(self, world_size: int) -> tuple[int, int]:
        """Return (micro_batch_size, gradient_accumulation_steps) for `world_size` processes.

        Raises:
            UserError: the global batch does not divide.
        """
        share, rest = divmod(self.global_batch_size, world_size)
        if rest or share == 0:
            nearest = max(1, round(self.global_batch_size / world_size)) * world_size
            raise UserError(
                f"batch.global_batch_size: {self.global_batch_size} sequences do not divide among "
                f"{world_size} processes; try --batch.global_batch_size {nearest}"
            )
        micro = self.micro_batch_size
        if micro is None:
            micro = max(size for size in range(1, min(share, 8) + 1) if share % size == 0)
        if share % micro:
            raise UserError(
                f"batch.micro_batch_size: {micro} does not divide the {share} sequences of each "
                f"process (global_batch_size {self.global_batch_size} over {world_size} processes)"
            )
        return micro, share // micro


@dataclass(kw_only=True)
class OptimizerSettings:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    lr: float = 2e-5
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only; norms and biases are not decayed."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(math.isfinite(value), f"optimizer.{name}: {value} is not a finite number")
        require(self.lr > 0, f"optimizer.lr: {self.lr} is not positive")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}: {value} is not in [0, 1)")
        require(self.eps > 0, f"optimizer.eps: {self.eps} is not positive")
        require(self.weight_decay >= 0, f"optimizer.weight_decay: {self.weight_decay} is negative")
        require(
            self.max_grad_norm > 0,
            f"optimizer.max_grad_norm: {self.max_grad_norm} is not positive; "
            "use a large number, such as 1e9, to switch clipping off",
        )


@dataclass(kw_only=True)
class ScheduleSettings:
    """The shape of the learning rate over the run."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.1
    """The last step's learning rate, as a fraction of the peak."""

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, f"schedule.warmup_steps: {self.warmup_steps} is negative")
        require(
            0 <= self.min_lr_ratio <= 1,
            f"schedule.min_lr_ratio: {self.min_lr_ratio} is not between 0 and 1",
        )


@dataclass(kw_only=True)
class EvaluationSettings:
    """When the validation rows are scored."""

    every_steps: int = 100
    """Also before the first step and after the last."""

    def __post_init__(self) -> None:
        require(
            self.every_steps >= 1, f"evaluation.every_steps: {self.every_steps} is not positive"
        )


@dataclass(kw_only=True)
class TextEvaluationSettings(EvaluationSettings):
    """When the validation text is scored, and how much of it."""

    max_tokens: int | None = None
    """Score this many tokens from the start of the validation text; default: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.max_tokens is None or self.max_tokens >= 1,
            f"evaluation.max_tokens: {self.max_tokens} is not positive",
        )


@dataclass(kw_only=True)
class CheckpointSettings:
    """When the run is saved, and how much is kept."""

    every_steps: int = 100
    """Also at the end, and when the cluster asks the run to stop."""
    keep: int = 3
    """Checkpoints to keep; the newest complete one is never deleted."""

    def __post_init__(self) -> None:
        require(
            self.every_steps >= 1, f"checkpoint.every_steps: {self.every_steps} is not positive"
        )
        require(
            self.keep >= 2,
            f"checkpoint.keep: {self.keep} is less than 2; with only one, a damaged checkpoint "
            "would be the end of the run",
        )

    @property
    def asynchronous(self) -> bool:
        """Whether training continues while it is written."""
        return False


@dataclass(kw_only=True)
class ShardCheckpointSettings(CheckpointSettings):
    """For a run whose processes each write a share of the state."""

    asynchronous: bool = True
    """Write in the background while training continues; needs host memory for a process's share."""
