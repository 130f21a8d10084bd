"""Folders of data for the tests of which files are read."""

from __future__ import annotations

from pathlib import Path

from train.engine import datafiles
from train.engine.datafiles import DataFiles


def make(folder: Path, *names: str) -> Path:
    """Make files, each with its own name as its content."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    return folder


def find(path: Path) -> DataFiles:
    return datafiles.find(str(path), "data.train")


def names(found: DataFiles, folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in found.files]
