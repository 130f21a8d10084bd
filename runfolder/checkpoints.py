"""The checkpoint folders of a run: their names and their steps."""

from __future__ import annotations

import re
from pathlib import Path

from runfolder.errors import UserError

_NAME = re.compile(r"step-([0-9]{1,18})")


def folder_name(step: int) -> str:
    """Return the name of the checkpoint after this optimizer step."""
    return f"step-{step:08d}"


def published(checkpoints: Path) -> list[Path]:
    """Return the folders of the complete checkpoints, newest first."""
    try:
        found = [path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name)]
    except OSError:
        return []
    return sorted((path for path in found if path.is_dir()), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was taken, by its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def made_with(checkpoint: Path, name: str, was: object, now: object) -> UserError:
    """Return the error for a run whose settings are other than those its checkpoint depends on."""
    return UserError(
        f"{checkpoint}: was made with {name} {was}, not {now}; continue the run with its own "
        "settings, or start a new one"
    )


def newest_step(run: Path) -> int | None:
    """Return the step of a run's newest checkpoint; None without one."""
    found = published(run / "checkpoints")
    return step_of(found[0]) if found else None


def newest_write(run: Path, place: str) -> float:
    """Return when a file was last written below `place`, a folder or file seen from the run's.

    0 where there is none. For checkpoints whose names we do not know.
    """
    root = run / place
    times = [0.0]
    for path in [root, *root.rglob("*")]:
        try:
            if path.is_file():
                times.append(path.stat().st_mtime)
        except OSError:
            # Another process may just have deleted it.
            continue
    return max(times)
