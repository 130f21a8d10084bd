"""Processor time, shared out over the workers of a run: what computes takes its turn.

Two cores that train in twelve processes end no sooner than with three, but every limit of time in
the product and in the tests is met on the way. A test that computes says with how many processes
(`@pytest.mark.computes(2)`) and begins when there is room; what only waits asks for none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# Three times the cores: what computes also waits, for a disk, a peer or Slurm; with twice the cores
# they were idle for almost half of a run.
SLOTS = 3 * len(os.sched_getaffinity(0))


@contextmanager
def turn(folder: Path, processes: int) -> Iterator[None]:
    """Hold room for `processes` of all that the locks in `folder` share out.

    More than there is at all means all there is. Whoever asks first is served first, and nobody
    asks for more while holding some, so that all come to their turn.
    """
    folder.mkdir(exist_ok=True)
    wanted = min(processes, SLOTS)
    slots = [FileLock(folder / f"slot-{number}") for number in range(SLOTS)]
    with ExitStack() as stack:
        with FileLock(folder / "queue"):
            while wanted:
                for slot in slots:
                    if wanted and not slot.is_locked:
                        try:
                            stack.enter_context(slot.acquire(timeout=0))
                        except Timeout:
                            continue
                        wanted -= 1
                if wanted:
                    time.sleep(0.05)
        yield
