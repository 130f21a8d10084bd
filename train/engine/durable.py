"""Files that are written to disk completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from train.engine.errors import RunFailed


@contextlib.contextmanager
def folder_at_once(output: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `output` at the end of the block.

    Until then it is a hidden folder beside `output`, and an existing `output` stays in place.

    Raises:
        RunFailed: it could not be written.
    """
    unfinished = output.with_name(f".{output.name}.unfinished")
    replaced = output.with_name(f".{output.name}.replaced")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        # safetensors creates files that only the owner can read; the folder follows the umask.
        for file in unfinished.iterdir():
            file.chmod(unfinished.stat().st_mode & 0o666)
            fsync(file)
        fsync(unfinished)
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
        unfinished.rename(output)
        fsync(output.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        raise RunFailed(f"{output}: could not be written ({error})") from None
    shutil.rmtree(replaced, ignore_errors=True)


def describe(path: Path) -> dict[str, Any]:
    """Return size and hash of a file, after it has reached the disk."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; memory does not grow with it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
