"""Named points of a run at which a process can be stopped, for tests that kill it exactly there.

    SLUICE_PAUSE_AT=/folder/before-rename      the first time that a process gets there
    SLUICE_PAUSE_AT=/folder/after-step@12      the twelfth time that a process gets there

The first process that gets there creates that file, with its PID in it, and stops (SIGSTOP).
Whoever waits for the file then kills the process, signals it, or resumes it (SIGCONT); all other
processes continue. Only the standard library is needed here.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import Counter
from pathlib import Path

from runfolder.errors import UserError, did_you_mean

VARIABLE = "SLUICE_PAUSE_AT"
MOMENTS = {
    "in-staging": "a job's data is complete, under its hidden name",
    "in-preflight": "a node has checked itself, and not yet the others",
    "loaded": "a process has imported the training libraries, and does not heed signals yet",
    "before-step": "a script of any kind is about to take an optimizer step",
    "after-step": "an optimizer step was taken; it is not logged or saved yet",
    "in-evaluation": "a batch of validation or test rows was scored",
    "in-shard": "half of a rank's part of a checkpoint is written",
    "before-manifest": "every rank's part of a checkpoint is on the disk",
    "before-rename": "a checkpoint is complete, under its hidden name",
    "before-latest": "a checkpoint has its name; `latest` names the previous one",
    "after-latest": "`latest` names it; surplus checkpoints are not deleted yet",
}
_counts: Counter[str] = Counter()


def check() -> None:
    """Raise `UserError` if $SLUICE_PAUSE_AT does not name a moment in an existing folder.

    Whoever waits for its file would wait forever.
    """
    if wanted := os.environ.get(VARIABLE):
        path, _, _ = _parse(wanted)
        if not path.parent.is_dir():
            raise UserError(f"{VARIABLE}: {path.parent} is not a folder")


def reached(name: str) -> None:
    """Stop this process if it has reached the moment that $SLUICE_PAUSE_AT names.

    Raises:
        UserError: the variable does not name a moment.
    """
    assert name in MOMENTS, name
    if wanted := os.environ.get(VARIABLE):
        path, moment, time = _parse(wanted)
        _counts[name] += 1
        if moment == name and _counts[name] == time and _is_first(path):
            # To this thread: a signal to the process may stop another thread first.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _parse(wanted: str) -> tuple[Path, str, int]:
    path = Path(wanted)
    name, _, time = path.name.partition("@")
    if name not in MOMENTS or not re.fullmatch(r"([1-9][0-9]*)?", time):
        raise UserError(
            f"{VARIABLE}: '{path.name}' is not a moment, or MOMENT@NUMBER"
            f"{did_you_mean(name, MOMENTS)}"
        )
    return path, name, int(time or 1)


def _is_first(path: Path) -> bool:
    """Create the file, unless another process has; it is never seen empty."""
    mine = path.with_name(f".{path.name}.{os.getpid()}")
    mine.write_text(f"{os.getpid()}\n")
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    finally:
        mine.unlink()
    return True
