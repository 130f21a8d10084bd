"""The settings of lab 5."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from runfolder.errors import UserError
from train.engine.sampling import SampleSettings
from train.engine.settings import SourceSettings, require
from train.engine.tuning import TuningConfig


@dataclass(kw_only=True)
class ConversationSettings(SourceSettings):
    """The conversations, and what of them is learned."""

    PATHS: ClassVar[tuple[str, ...]] = ("train", "validation", "chat_template")

    name: str | None = "trl-lib/Capybara"
    column: str | None = None
    """The column with the turns. Default: messages, conversations, prompt and completion, or
    instruction, input and output, whichever is there."""
    hold_back_every: int = 20
    """Without `validation`, every so many rows of the training data one is held back for it."""
    chat_template: str | None = None
    """How a conversation is written: a .jinja file, or chatml. Default: the tokenizer's own, or
    where it has none, the one in docs/lab5-chat.md."""
    learn: Literal["answers", "last_answer"] = "answers"
    """The turns that are learned: all of the assistant's, or the last one of each conversation."""
    bad_rows: Literal["refuse", "leave_out"] = "refuse"
    """What happens to a row that is no conversation, or that the chat template does not take."""
    too_long: Literal["cut_end", "cut_front", "leave_out"] = "cut_end"
    """What happens to a conversation that is longer than a block."""
    packing: bool = True
    """Several conversations share a block, each of which sees itself alone; false: one each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.train is not None or self.validation is None,
            "data.validation: is given without data.train; give both, so that local data is not "
            "mixed with a dataset of the hub",
        )
        require(
            self.hold_back_every >= 2,
            f"data.hold_back_every: {self.hold_back_every} is less than 2",
        )


@dataclass(kw_only=True)
class Config(TuningConfig):
    """Fine-tune a pretrained language model on conversations."""

    data: ConversationSettings = field(default_factory=ConversationSettings)
    sample: SampleSettings = field(
        default_factory=lambda: SampleSettings(
            prompts=("What is a compute cluster?", "How do I write a good commit message?"),
            max_new_tokens=64,
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile and self.data.packing:
            raise UserError(
                "compile: packed conversations have other lengths at each step, for which it would "
                "compile again; leave it out, or add --data.packing false"
            )
