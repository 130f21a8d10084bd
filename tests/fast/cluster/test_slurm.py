"""slurm.py: answers of Slurm's commands that differ from release to release."""

from __future__ import annotations

from typing import Any

import pytest

from cluster import slurm


class Says(slurm.Slurm):
    """A Slurm that knows one answer."""

    def call(self, *command: str, **_: Any) -> str:
        return self.prefix[0]


@pytest.mark.parametrize("more", ["", "a "])
def test_an_estimate_of_any_release(more: str) -> None:
    said = f"sbatch: Job 2 to start at 2026-11-25T03:39:06 {more}using 4 processors on nodes "
    trial = Says(prefix=(said + "node[1-2] in partition gpu\n",)).trial(["sbatch", "x"], {})
    assert (trial.start, trial.nodes) == ("2026-11-25T03:39:06", "node[1-2]")
    queue = Says(prefix=(said + "node[1-2] in partition gpu\n",))
    assert queue.expected_start(["sbatch", "x"], {}) == "2026-11-25 03:39:06 on node[1-2]"


def test_an_estimate_that_is_none() -> None:
    assert Says(prefix=("sbatch: some other words\n",)).trial(["sbatch", "x"], {}) == slurm.Trial()


def test_the_first_of_a_key_counts() -> None:
    line = "NodeName=n1 OS=Linux 6.1 #1 SMP State=DOWN Reason=bad State=IDLE [root@today]"
    fields = slurm.fields_of(line)
    assert (fields["OS"], fields["State"], fields["Reason"]) == ("Linux 6.1 #1 SMP", "DOWN", "bad")
