"""The length of a training in epochs and seeds, turned into a number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from runfolder.errors import UserError
from train.engine.config import LoopSettings

# If neither steps nor epochs are given.
NUM_EPOCHS = 3.0


@dataclass(kw_only=True)
class EpochSettings(LoopSettings):
    """The length of a run of one or more trainings, each with its seed."""

    max_steps: int = 0
    """Optimizer steps in the whole run, all seeds together; 0: given by `num_epochs`."""
    num_epochs: float | None = None
    """How often each seed's training sees every row, instead of `max_steps`; 3 if neither is
    given."""
    num_seeds: int = 1
    """Number of trainings, with seed, seed + 1, ...; reports mean and standard deviation."""
    dry_run: bool = False
    """A few steps of a small random encoder on the embedded sample: train, stop, resume, test."""

    def __post_init__(self) -> None:
        given, self.max_steps = self.max_steps, self.max_steps or 1
        super().__post_init__()
        self.max_steps = given
        if self.num_seeds < 1:
            raise UserError(f"num_seeds: {self.num_seeds} is not positive")
        if self.num_epochs is None:
            return
        if not (math.isfinite(self.num_epochs) and self.num_epochs > 0):
            raise UserError(f"num_epochs: {self.num_epochs} is not a positive number")
        # A dry run has its own steps, and the command line overrides it.
        if self.max_steps and not self.dry_run:
            raise UserError(
                f"num_epochs: {self.num_epochs} is given with max_steps {self.max_steps}; "
                "leave one of them out"
            )

    def count_steps(self, num_rows: int, global_batch_size: int) -> int:
        """Return the optimizer steps of the whole run, for `num_rows` rows in an epoch.

        Raises:
            UserError: the steps do not divide among the seeds.
        """
        if self.num_epochs is None and self.max_steps:
            rest = self.max_steps % self.num_seeds
            if rest:
                raise UserError(
                    f"max_steps: {self.max_steps} do not divide among {self.num_seeds} seeds; "
                    f"try --max_steps {self.max_steps + self.num_seeds - rest}"
                )
            return self.max_steps
        rows_of_a_seed = (self.num_epochs or NUM_EPOCHS) * num_rows
        return self.num_seeds * math.ceil(rows_of_a_seed / global_batch_size)
