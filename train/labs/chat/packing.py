"""Which examples share a row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def rows_of(
    lengths: npt.NDArray[np.int64], room: int, *, packing: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the examples in the order of the rows, and where in it each row begins, and the end.

    Best fit decreasing: the longest first, each into the fullest row that has room for it
    (Johnson 1973, "Near-optimal bin packing algorithms"). `packing` false: one in each row.
    """
    if not packing:
        return np.arange(len(lengths)), np.arange(len(lengths) + 1)
    rows: list[list[int]] = []
    # The rows with so many places left, and a bit for each such number.
    with_room: list[list[int]] = [[] for _ in range(room + 1)]
    bits = 0
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        fitting = bits >> length
        if fitting:
            size = length + (fitting & -fitting).bit_length() - 1
            row = with_room[size].pop()
            if not with_room[size]:
                bits ^= 1 << size
        else:
            size, row = room, len(rows)
            rows.append([])
        rows[row].append(example)
        with_room[size - length].append(row)
        bits |= 1 << (size - length)
    # Not the longest first: an evaluation may read only the first rows.
    rows.sort(key=min)
    firsts = np.cumsum([0, *map(len, rows)])
    return np.asarray([example for row in rows for example in row]), firsts
