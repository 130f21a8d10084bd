"""Which rows form which batch: texts of similar length together, split among the processes.

The order is a pure function of the seed, and the position in it is one number, the step. So a
checkpoint need not save it, and any number of processes trains on the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

# Rows are drawn at random in lots of this many batches, and sorted by length within a lot: enough
# for batches with little padding. With two or more lots, the batches differ in each epoch.
LOT = 50


class GroupedBatches:
    """The micro batches of one process, for a whole run: a batch sampler of torch's DataLoader.

    Each epoch takes every row once. If the rows do not divide evenly into batches, the last rows
    of an epoch share a batch with the first of the next: none is skipped, none is repeated, and
    each process has a full share in every step.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        num_steps: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch, self._rows = -1, np.empty(0, dtype=np.int64)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Return all rows in the order of an epoch."""
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._shuffle(epoch)
        return self._rows

    def step_rows(self, step: int) -> np.ndarray:
        """Return the rows of a step, of all processes."""
        start = step * self.global_batch_size
        parts = []
        while (left := (step + 1) * self.global_batch_size - start) > 0:
            epoch, offset = divmod(start, len(self.lengths))
            parts.append(self.epoch_order(epoch)[offset : offset + left])
            start += len(parts[-1])
        return np.concatenate(parts)

    def describe(self) -> str:
        """Return in one line which rows this process trains on."""
        whole, rest = divmod(len(self.lengths), self.global_batch_size)
        # The last rows of the epoch begin a step, and are split like those of every other.
        own = whole * (self.global_batch_size // self.world_size)
        own += len(range(self.rank, rest, self.world_size))
        first = next(iter(self)).copy()
        shown = ", ".join(str(row) for row in first[:8]) + (", ..." if len(first) > 8 else "")
        return (
            f"rank {self.rank} trains on {own:,} of {len(self.lengths):,} rows in the first epoch, "
            f"in step 1 on rows {shown}"
        )

    def __len__(self) -> int:
        """Return the micro batches of this process in the run."""
        return self.num_steps * len(self._parts(np.empty(self.global_batch_size)))

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.num_steps):
            for part in self._parts(self.step_rows(step)):
                yield part.tolist()

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        # Every world_size-th row, because neighbours have similar lengths: equal work for all.
        share = rows[self.rank :: self.world_size]
        return np.split(share, range(self.micro_batch_size, len(share), self.micro_batch_size))

    def _shuffle(self, epoch: int) -> np.ndarray:
        size, num_rows = self.global_batch_size, len(self.lengths)
        random = np.random.default_rng([self.seed, epoch])
        rows = random.permutation(num_rows)
        lot_rows = min(LOT, max(1, num_rows // (2 * size))) * size
        lots = np.split(rows, range(lot_rows, num_rows, lot_rows))
        rows = np.concatenate([lot[np.argsort(self.lengths[lot], kind="stable")] for lot in lots])
        # The first rows fill the last step of the previous epoch, so that the groups are steps.
        first = min(-epoch * num_rows % size, num_rows)
        groups = np.split(rows, range(first, num_rows, size))
        begin = groups[:1] if first else []
        end = groups[-1:] if (num_rows - first) % size and len(groups) > len(begin) else []
        whole = groups[len(begin) : len(groups) - len(end)]
        # np.split gives an empty first part if `first` is 0.
        whole = [whole[i] for i in random.permutation(len(whole))]
        return np.concatenate([*begin, *whole, *end])
