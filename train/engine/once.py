"""A folder that is made once, by whichever process comes first, and appears whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from runfolder.moments import reached
from train.engine.errors import check_writable_folder


class CutOff(UserError):
    """A download was interrupted; the next one can continue it."""


def datasets_folder() -> Path:
    """Return the folder for datasets: $SLUICE_DATASETS, or `datasets` in the current folder."""
    return Path(os.environ.get("SLUICE_DATASETS", "datasets")).absolute()


def staged_path(name: str) -> Path:
    """Return the full path of a `StagedPaths` entry; relative ones are in the datasets folder."""
    return datasets_folder() / name


def relative_to_datasets(path: Path) -> str:
    """Return a path as `StagedPaths` has it: relative if it is in the datasets folder."""
    root = datasets_folder()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def fingerprint(files: Iterable[Path]) -> list[Any]:
    """Return what identifies the files and changes when they change, without reading them."""
    stats = [(str(file.absolute()), file.stat()) for file in files]
    return [(name, s.st_size, s.st_mtime_ns) for name, s in stats]


def named_by_content(parent: Path, *made_of: Any) -> Path:
    """Return the folder in `parent` whose name is a hash of what it is made of (JSON)."""
    return parent / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def make_once(
    folder: Path,
    make: Callable[[Path], None],
    what: str,
    *,
    online: bool = True,
    goes_on: bool = False,
) -> Path:
    """Return `folder`, made by `make` if it is not there; a second process waits for the first.

    `make` fills a folder beside it, which is renamed when it is complete. `goes_on` says that
    `make` can continue from what it left when it was interrupted.

    Raises:
        UserError: the folder cannot be written, or it needs a network and `online` is False.
    """
    if folder.is_dir():
        return folder
    if not online:
        raise UserError(f"{what} is not staged; run `make fetch` where there is a network")
    check_writable_folder(folder.parent, "SLUICE_DATASETS")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.unfinished"
    with _lock(folder.parent / ".lock", what):
        if folder.is_dir():
            return folder
        print(f"staging {what}", flush=True)
        if not goes_on:
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(exist_ok=True)
        try:
            make(unfinished)
            reached("in-staging")
            unfinished.rename(folder)
        except BaseException as error:
            was_cut_off = isinstance(error, CutOff | KeyboardInterrupt)
            if not (goes_on and was_cut_off and any(unfinished.iterdir())):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return folder


@contextmanager
def _lock(path: Path, what: str) -> Iterator[None]:
    # A file of its own: network file systems lock only what is open for writing.
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is staging {what} or similar", flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"SLUICE_DATASETS: {path.parent} does not support file locks ({error.strerror}); "
                "choose another place"
            ) from None
        yield
