"""Which part of a pretrained encoder trains when: phases of a run; without torch.

An encoder is treated as a stack of blocks: its layers, and below them the rest (the embeddings).
A phase trains a head and the top N blocks, for a number of optimizer steps. "Backbone frozen",
"everything trains" and gradual unfreezing (Howard & Ruder 2018, arXiv:1801.06146, section 3.3) are
three lists of such phases, so one loop serves all three.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from runfolder.errors import UserError

Freeze = Literal["backbone", "none", "gradual"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Optimizer steps in which the same parameters train."""

    first_step: int
    """The steps of the run before this phase."""
    steps: int
    blocks: int
    """Blocks of the encoder that train with the head, counted from the top."""

    @property
    def end(self) -> int:
        """The steps of the run after this phase."""
        return self.first_step + self.steps


@dataclass(kw_only=True)
class UnfreezingSettings:
    """Which blocks train when, and how fast."""

    phases: str = "0:50 2:20 4:30"
    """For --freeze gradual: BLOCKS:PERCENT of each phase, from the top, of max_steps."""
    head_lr: float = 1e-3
    """Peak learning rate of the head; optimizer.lr is the one of the encoder's top block."""
    block_decay: float = 0.8
    """A block's learning rate, as a multiple of the rate of the block above it."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.head_lr) and self.head_lr > 0):
            raise UserError(f"unfreezing.head_lr: {self.head_lr} is not a positive number")
        if not 0 < self.block_decay <= 1:
            raise UserError(f"unfreezing.block_decay: {self.block_decay} is not in (0, 1]")
        self.parsed()

    def parsed(self) -> list[tuple[int, int]]:
        """Return (blocks, percent of max_steps) of each phase.

        Raises:
            UserError: `phases` does not begin with only the head, does not go deeper each time,
                or does not use all the steps.
        """
        words = self.phases.split()
        if not words or not all(re.fullmatch(r"\d{1,4}:\d{1,3}", word) for word in words):
            raise UserError(
                f"unfreezing.phases: '{self.phases}' is not of the form BLOCKS:PERCENT, one for "
                "each phase, such as '0:50 2:20 4:30'"
            )
        phases = [(int(word.partition(":")[0]), int(word.partition(":")[2])) for word in words]
        blocks, percents = zip(*phases, strict=True)
        if blocks[0] != 0:
            raise UserError(
                f"unfreezing.phases: begins with {blocks[0]} blocks; begin with 0, only the head, "
                "so that an untrained head does not spoil the encoder"
            )
        if list(blocks) != sorted(set(blocks)):
            raise UserError(
                f"unfreezing.phases: '{self.phases}' does not go deeper with each phase; give more "
                "blocks in each, as unfrozen blocks stay unfrozen"
            )
        if sum(percents) != 100 or 0 in percents:
            raise UserError(
                f"unfreezing.phases: the percentages {', '.join(map(str, percents))} are not "
                f"positive numbers that add up to 100 (the sum is {sum(percents)})"
            )
        return phases


def plan(
    freeze: Freeze, settings: UnfreezingSettings, *, max_steps: int, num_blocks: int
) -> list[Phase]:
    """Return the phases of a run of `max_steps` over an encoder of `num_blocks`.

    Raises:
        UserError: a phase has more blocks than there are, or would have no step.
    """
    if freeze == "backbone":
        return [Phase(first_step=0, steps=max_steps, blocks=0)]
    if freeze == "none":
        return [Phase(first_step=0, steps=max_steps, blocks=num_blocks)]
    phases: list[Phase] = []
    percent_done = first_step = 0
    for blocks, percent in settings.parsed():
        if blocks > num_blocks:
            raise UserError(
                f"unfreezing.phases: {blocks} blocks should train, but the encoder has only "
                f"{num_blocks}: {num_blocks - 1} layers, and the embeddings"
            )
        percent_done += percent
        end = max_steps * percent_done // 100
        if end == first_step:
            raise UserError(
                f"max_steps: {max_steps} leaves no step for the phase {blocks}:{percent} of "
                "unfreezing.phases; give more steps"
            )
        phases.append(Phase(first_step=first_step, steps=end - first_step, blocks=blocks))
        first_step = end
    return phases
