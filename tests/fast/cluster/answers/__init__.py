"""What real Slurms of three releases answer, as tests/real has them, and one that says it again.

Each has one job running, one that waits and one held, a maintenance to come, and limits of QOS,
account and user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.slurm.call import Slurm

RELEASES = ("22.05", "24.11", "26.05")
USER = "ada"


def of(release: str) -> dict[str, str]:
    """Return the answers of a release, by command."""
    content: dict[str, str] = json.loads((Path(__file__).parent / f"{release}.json").read_text())
    return content


@dataclass(frozen=True, kw_only=True)
class Recorded(Slurm):
    """A Slurm that answers as one did before, or as `change` makes of it."""

    answers: Mapping[str, str]
    change: Callable[[str, str], str] = field(default=lambda command, said: said)

    def call(self, *command: str, **_: object) -> str:
        if command[0] == "sbatch":
            return self.change("sbatch", "")
        (words,) = [known for known in self.answers if _same(known, command)]
        return self.change(words, self.answers[words])


def _same(known: str, command: tuple[str, ...]) -> bool:
    # The user of the test may be another.
    return re.sub(r"\S*=ada|ada", "", known) == re.sub(r"\S*=ada|ada", "", " ".join(command))
