from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from train.engine import shares
from train.engine.shares import gather_in_order, share


@pytest.fixture(params=[1, 2, 3, 7])
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a group of so many ranks, played by this process: `become(rank)` for each."""
    size: int = request.param
    monkeypatch.setattr(shares, "world_size", lambda: size)

    def become(number: int) -> Any:
        monkeypatch.setattr(shares, "rank", lambda: number)
        return share

    return [lambda number=number: become(number) for number in range(size)]


@pytest.mark.parametrize("num_rows", [0, 1, 2, 6, 7, 41])
def test_shares_take_every_row_once_and_come_back_in_order(
    ranks: list[Any], num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.arange(num_rows * 3, dtype=np.float32).reshape(num_rows, 3)
    taken = [list(become()(num_rows)) for become in ranks]
    assert sorted(row for part in taken for row in part) == list(range(num_rows))
    assert max(map(len, taken)) - min(map(len, taken)) <= 1

    def gather(parts: list[Any], local: np.ndarray) -> None:
        parts[:] = [rows[indices] for indices in taken]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    gathered = gather_in_order(rows[taken[0]], total=num_rows)
    assert gathered.dtype == rows.dtype
    assert np.array_equal(gathered, rows)


def test_a_share_that_is_not_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 0 returned 2 rows of its 3"):
        gather_in_order(np.zeros((2, 4)), total=3)
