"""The rows of an evaluation, split among the processes and gathered again.

Row i belongs to rank i % world_size. No row is added or dropped, unlike with a sampler that makes
all shares equal: two processes score exactly the rows that one does, in the same order.
"""

from __future__ import annotations

import numpy as np

from train.engine.distributed import rank, world_size


def share(num_rows: int) -> range:
    """Return the rows of this rank: row number `rank()`, and every world_size-th after it.

    Shares differ by one row at most. With fewer rows than ranks some are empty.
    """
    return range(rank(), num_rows, world_size())


def gather_in_order(local_rows: np.ndarray, *, total: int) -> np.ndarray:
    """Return the results of all `total` rows in order, on every rank; collective.

    `local_rows` holds this rank's, of shape (len(share(total)), ...). The dtype and the shape
    after the first dimension must be the same on every rank, even on one without rows.

    Raises:
        ValueError: a rank's number of rows differs from its share; raised on every rank, so that
            none waits for it.
    """
    import torch.distributed as dist

    parts: list[np.ndarray | None] = [local_rows]
    if dist.is_initialized():
        parts = [None] * world_size()
        dist.all_gather_object(parts, local_rows)
    gathered = np.empty((total, *local_rows.shape[1:]), local_rows.dtype)
    for number, part in enumerate(parts):
        places = range(number, total, len(parts))
        if part is None or len(part) != len(places):
            count = "no" if part is None else len(part)
            raise ValueError(f"rank {number} returned {count} rows of its {len(places)}")
        gathered[places.start :: places.step] = part
    return gathered
