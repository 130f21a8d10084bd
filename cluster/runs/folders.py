"""Run folders: where they are, how they are found, and how one is made."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.runs import checkout
from cluster.site import places
from runfolder import records
from runfolder.errors import UserError

# The time at which a run was made, and a number of its own.
STAMP = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")


def runs_folder() -> Path:
    """Return the folder of all runs: $SLUICE_RUNS, or site.toml's, or `runs` in the checkout."""
    return places.here() / places.folder("runs")


def datasets_folder() -> Path:
    """Return the folder of the runs' data: $SLUICE_DATASETS, site.toml's, or `datasets` here."""
    return places.here() / places.folder("datasets")


def find(name: str) -> Path:
    """Return the folder of a run: a path, JOB/STAMP, STAMP or its start, NAME, or JOB.

    If there are several, as with JOB, it is the newest.

    Raises:
        UserError: there is none.
    """
    root = runs_folder()
    for candidate in (Path(name), root / name):
        if name and (candidate / "run.json").is_file():
            return Path(os.path.normpath(places.here() / candidate))
    # A name begins with its time, so the last is the newest.
    below = [path.parent for path in root.glob("*/*/run.json") if path.parent.name[0] != "."]
    below.sort(key=lambda folder: folder.name)
    for folder in reversed(below):
        if name and (
            folder.parent.name == name
            or folder.name.startswith(name)
            or folder.name.endswith(f"-{name}")
        ):
            return folder
    newest = [str(folder.relative_to(root)) for folder in reversed(below)][:3]
    hint = f"the newest are {', '.join(newest)}" if newest else f"{root} holds no runs yet"
    raise UserError(f"RUN={name}: there is no such run; {hint}")


def new_folder(job: str, name: str) -> Path:
    """Return the folder for a run that starts now: JOB/STAMP[-NAME] below the runs folder.

    Raises:
        UserError: the name has characters that are not allowed, or the place cannot be written.
    """
    if name and not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UserError(f"NAME={name}: use letters, digits, '.', '_' and '-'")
    root = runs_folder()
    named = STAMP.pattern + re.escape(f"-{name}")
    for taken in root.glob(f"*/*-{name}") if name else ():
        if re.fullmatch(named, taken.name):
            raise UserError(
                f"NAME={name}: {taken.relative_to(root)} has this name; choose another, or "
                f"continue that run with RUN={name}"
            )
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder = root / job / (f"{stamp}-{name}" if name else stamp)
    existing = next(parent for parent in folder.parents if os.path.lexists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{places.folder_setting('runs')}: {existing} is not a folder that you can write to; "
            "choose another place"
        )
    return folder


def create(
    folder: Path,
    *,
    content: dict[str, Any],
    fill: Callable[[Path], None],
    script_folder: Path | None = None,
) -> None:
    """Make the run folder: run.json with `content`, the code as it is now, and what `fill` writes.

    It appears complete, by a rename. `script_folder`: of a script outside the checkout, which
    becomes code/script.

    Raises:
        UserError: the place cannot be written.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        git = checkout.copy(unfinished / "code")
        if diff := git.pop("diff"):
            (unfinished / "code.diff").write_bytes(diff)
        if script_folder is not None:
            own = checkout.copy(unfinished / "code" / records.SCRIPT_FOLDER, script_folder)
            if diff := own.pop("diff"):
                (unfinished / "script.diff").write_bytes(diff)
            git |= {"script_folder": checkout.place_of(script_folder)}
            git |= {f"script_{key}": value for key, value in own.items()}
        fill(unfinished)
        records.write(unfinished, content | git)
        unfinished.rename(folder)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{places.folder_setting('runs')}: the run folder cannot be created: {error.filename}: "
            f"{error.strerror}; choose another place"
        ) from None
