"""Run folders: the record of a run, and the letter box between `cluster/` and `train/`."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from cluster import checkout, site
from cluster.errors import UserError


def runs_folder() -> Path:
    """Return the folder of all runs: $SLUICE_RUNS, or site.toml's, or `runs` in the checkout."""
    return site.here() / site.folder("runs")


def datasets_folder() -> Path:
    """Return the folder of what runs read: $SLUICE_DATASETS, site.toml's, or `datasets` here."""
    return site.here() / site.folder("datasets")


def find(name: str) -> Path:
    """Return the folder of a run: a path, JOB/STAMP, STAMP or its start, NAME, or JOB.

    Of several, as with JOB, it is the newest.

    Raises:
        UserError: there is none.
    """
    root = runs_folder()
    for candidate in (Path(name), root / name):
        if name and (candidate / "run.json").is_file():
            return Path(os.path.normpath(site.here() / candidate))
    # A name begins with its time, so that the last is the newest.
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
        UserError: the name has other characters than a path wants, or the place is no good.
    """
    if name and not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UserError(f"NAME={name}: use letters, digits, '.', '_' and '-'")
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder = runs_folder() / job / (f"{stamp}-{name}" if name else stamp)
    existing = next(parent for parent in folder.parents if os.path.lexists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{site.folder_setting('runs')}: {existing} is not a folder that you can write; choose "
            "another place"
        )
    return folder


def create(folder: Path, *, config: str, record: dict[str, Any]) -> None:
    """Make the run folder: run.json, config.yaml and the code as it is now.

    It appears whole, by a rename.

    Raises:
        UserError: the place cannot be written.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        git = checkout.copy(unfinished / "code")
        if diff := git.pop("diff"):
            (unfinished / "code.diff").write_bytes(diff)
        (unfinished / "config.yaml").write_text(config, encoding="utf-8")
        content = {**record, **git, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        (unfinished / "run.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(folder)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{site.folder_setting('runs')}: the run folder cannot be made: {error.filename}: "
            f"{error.strerror}; choose another place"
        ) from None


def record(folder: Path) -> dict[str, Any]:
    """Return the run.json of a run.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "run.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in ("job", "module", "accel", "num_processes"):
            content[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not the record of a run: {error}") from None
    return content


def submissions(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's jobs.jsonl, one for each time that it was queued.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "jobs.jsonl"
    if not path.exists():
        return []
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for entry in entries:
            int(entry["job_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not the record of a run's jobs: {error}") from None
    return entries


def write_whole(path: Path, text: str) -> None:
    """Write a file of a run anew: readers see the old one or the new, on a full disk the old."""
    # Its own name, because two commands may write at once.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)


def new_attempt(folder: Path) -> int:
    """Make the folder of the next attempt and return its number, 1 being the first."""
    attempts = folder / "attempts"
    attempts.mkdir(exist_ok=True)
    numbers = [int(path.name) for path in attempts.iterdir() if path.name.isdigit()]
    number = 1 + max(numbers, default=0)
    (attempts / str(number)).mkdir()
    return number


def check_free(folder: Path) -> None:
    """Raise `UserError` if a run works on the folder; the run itself takes the lock again."""
    try:
        descriptor = os.open(folder / "run.lock", os.O_RDWR)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        raise UserError(f"{folder}: another run works on it ({holder}); wait or stop it") from None
    finally:
        os.close(descriptor)
