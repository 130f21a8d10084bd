"""Named points of a run at which a process can be made to stop, for tests that kill it just there.

    SLUICE_PAUSE_AT=/folder/before-rename      the first time that a process comes there
    SLUICE_PAUSE_AT=/folder/after-step@12      the twelfth time that a process comes there

The first process that gets there makes that file, with its PID in it, and stops (SIGSTOP). Whoever
waits for the file then kills it, signals it, or lets it go on (SIGCONT); all others pass. Only the
standard library is needed here.
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
    "in-staging": "what a job reads is made, under its hidden name",
    "in-preflight": "a node has looked at itself, and not yet at the others",
    "after-step": "an optimizer step was taken; nothing of it is logged or saved",
    "in-evaluation": "a batch of validation or test rows was scored",
    "in-shard": "half of a rank's part of a checkpoint is written",
    "before-manifest": "every rank's part of a checkpoint is on the disk",
    "before-rename": "a checkpoint is whole, under its hidden name",
    "before-latest": "a checkpoint has its name; `latest` names the one before",
    "after-latest": "`latest` names it; those that are too many are still there",
}
_counts: Counter[str] = Counter()


def check() -> None:
    """Raise `UserError` if $SLUICE_PAUSE_AT names no moment in a folder that is there.

    Whoever waits for its file would wait for ever.
    """
    if wanted := os.environ.get(VARIABLE):
        path, _, _ = _parse(wanted)
        if not path.parent.is_dir():
            raise UserError(f"{VARIABLE}: {path.parent} is not a folder")


def reached(name: str) -> None:
    """Stop this process if it has come to the moment that $SLUICE_PAUSE_AT names.

    Raises:
        UserError: the variable names no moment.
    """
    assert name in MOMENTS, name
    if wanted := os.environ.get(VARIABLE):
        path, moment, time = _parse(wanted)
        _counts[name] += 1
        if moment == name and _counts[name] == time and _is_first(path):
            # To this thread: one that is sent to the process may stop another thread first.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _parse(wanted: str) -> tuple[Path, str, int]:
    path = Path(wanted)
    name, _, time = path.name.partition("@")
    if name not in MOMENTS or not re.fullmatch(r"([1-9][0-9]*)?", time):
        raise UserError(
            f"{VARIABLE}: '{path.name}' is not a moment, or one with @NUMBER"
            f"{did_you_mean(name, MOMENTS)}"
        )
    return path, name, int(time or 1)


def _is_first(path: Path) -> bool:
    """Make the file, unless another process has; it is never seen empty."""
    mine = path.with_name(f".{path.name}.{os.getpid()}")
    mine.write_text(f"{os.getpid()}\n")
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    finally:
        mine.unlink()
    return True
