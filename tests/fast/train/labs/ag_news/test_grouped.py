from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.labs.ag_news.grouped import GroupedBatches


def make(
    lengths: list[int], *, size: int = 8, world_size: int = 1, rank: int = 0, **more: int
) -> GroupedBatches:
    options = {"micro_batch_size": 2, "num_steps": 9, "seed": 1} | more
    return GroupedBatches(
        lengths, global_batch_size=size, world_size=world_size, rank=rank, **options
    )


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 90),
    world_size=st.sampled_from([1, 2, 4]),
    micro_batch_size=st.sampled_from([1, 2, 4]),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_epoch_takes_every_row_once_whatever_the_number_of_processes(
    num_rows: int, world_size: int, micro_batch_size: int, accumulation: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(3, 60, num_rows).tolist()
    size = world_size * micro_batch_size * accumulation
    num_steps = 3 * num_rows // size + 1
    ranks = [
        make(
            lengths,
            size=size,
            world_size=world_size,
            rank=rank,
            micro_batch_size=micro_batch_size,
            num_steps=num_steps,
            seed=seed,
        )
        for rank in range(world_size)
    ]
    batches = [list(rank) for rank in ranks]
    # Every process has the same number of full micro batches: none waits for another.
    assert {len(own) for own in batches} == {len(ranks[0])} == {num_steps * accumulation}
    assert {len(batch) for own in batches for batch in own} == {micro_batch_size}
    order: list[int] = []
    for step in range(num_steps):
        parts = [own[step * accumulation : (step + 1) * accumulation] for own in batches]
        rows = [row for own in parts for batch in own for row in batch]
        # One process would train on the same rows in this step.
        assert sorted(rows) == sorted(ranks[0].step_rows(step).tolist())
        order += ranks[-1].step_rows(step).tolist()
    for epoch in range(len(order) // num_rows):
        assert sorted(order[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_a_batch_has_texts_of_like_length_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).integers(5, 120, 1003).tolist()
    grouped = make(lengths, size=16, num_steps=300)

    def padding(rows: np.ndarray) -> float:
        chosen = np.array(lengths)[rows]
        return 1 - float(chosen.mean() / chosen.max())

    grouped_padding = np.mean([padding(grouped.step_rows(step)) for step in range(180)])
    shuffled = np.random.default_rng(1).permutation(1003)
    shuffled_padding = np.mean([padding(shuffled[i : i + 16]) for i in range(0, 992, 16)])
    assert grouped_padding < 0.1 < 0.3 < shuffled_padding
    # Not the same batches in another order either, as a sort of all rows would give; nor where
    # there are few rows.
    for many in (grouped, make(lengths[:40])):
        size = many.global_batch_size
        first, second = (
            {frozenset(many.step_rows(step).tolist()) for step in range(start, start + 4)}
            for start in (0, len(many.lengths) // size + 1)
        )
        assert not first & second
    # Short texts do not all come first: the groups are shuffled.
    means = [np.array(lengths)[grouped.step_rows(step)].mean() for step in range(60)]
    assert abs(float(np.corrcoef(means, range(60))[0, 1])) < 0.5


def test_the_order_follows_from_seed_and_step_alone() -> None:
    lengths = list(range(5, 50))
    whole = make(lengths, num_steps=40)
    later = make(lengths, num_steps=99)
    assert [later.step_rows(step).tolist() for step in (30, 3, 17)] == [
        whole.step_rows(step).tolist() for step in (30, 3, 17)
    ]
    assert make(lengths, seed=2).step_rows(0).tolist() != whole.step_rows(0).tolist()


def test_the_line_about_a_share_counts_its_rows() -> None:
    lines = [make([7] * 21, world_size=2, rank=rank).describe() for rank in (0, 1)]
    assert lines[0].startswith("rank 0 trains on 11 of 21 rows in the first epoch, in step 1 on")
    assert lines[1].startswith("rank 1 trains on 10 of 21 rows")
