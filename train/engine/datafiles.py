"""Which files a path in the settings selects, and which are left out.

A folder selects what the `datasets` library reads in it, and every file left out is named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from runfolder.errors import UserError
from train.engine import filenames
from train.engine.compression import is_compressed
from train.engine.filenames import SUFFIXES, suffix_of

_POINTER = b"version https://git-lfs"
_NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class DataFiles:
    """The files that a setting selects, in a fixed order, and the names of what is left out."""

    setting: str
    given: Path
    """The folder that was searched, or the file itself."""
    files: list[Path]
    left_out: list[str]

    def describe(self, what: str) -> str:
        """Return the line that says what was read; `what` counts it: 3,400 documents."""
        count = len(self.files)
        line = f"{self.setting}: {count:,} {'file' if count == 1 else 'files'}, {what}"
        line += f"; left out: {_some(self.left_out)}" if self.left_out else ""
        if others := self.of_other_splits():
            line += (
                f"; also read, though named like another split: {_some(others)} (move it elsewhere "
                "if it is one)"
            )
        return line

    def of_other_splits(self) -> list[str]:
        """Return the names of files in the given folder that name another split."""
        split = self.setting.rpartition(".")[2]
        names = [file.relative_to(self.given) for file in self.files if file != self.given]
        return [str(name) for name in names if filenames.is_of_other_split(name, split)]


def find(given: str, setting: str) -> DataFiles:
    """Return the files that `given` (a file or a folder) selects.

    A folder selects all files under it with one of `SUFFIXES`, compressed or not; links are
    followed. Left out are hidden files, folders such as __pycache__, files about the data
    (README.txt, dataset_info.json), and files that `datasets` itself keeps there; a file that
    links make appear twice counts once.

    Raises:
        UserError: there is none, its suffix is unsupported, something under it cannot be read, or
            there is data in an unsupported form.
    """
    with refusing(setting):
        path = Path(given)
        # ~name, without such a user.
        with suppress(RuntimeError):
            path = path.expanduser()
        if path.is_dir():
            found, left_out = _below(path, setting)
            if not found:
                also = f"; left out: {_some(left_out)}" if left_out else ""
                raise UserError(f"{setting}: {path} holds no {', '.join(SUFFIXES)} file{also}")
            return DataFiles(setting=setting, given=path, files=found, left_out=left_out)
        if not path.exists():
            raise UserError(f"{setting}: {path} does not exist")
        if suffix_of(path) is None:
            raise UserError(f"{setting}: {path} {filenames.refusal(path)}")
        _check_is_data(path, setting)
        return DataFiles(setting=setting, given=path, files=[path], left_out=[])


def find_rows(given: str, setting: str) -> DataFiles:
    """Return the files that `given` selects, all of which have columns.

    Raises:
        UserError: one is a txt file; or as `find`.
    """
    found = find(given, setting)
    if texts := [file for file in found.files if suffix_of(file) == ".txt"]:
        raise UserError(f"{setting}: {texts[0]} has no columns; give jsonl, csv or parquet")
    return found


@contextmanager
def refusing(setting: str) -> Iterator[None]:
    """Turn an `OSError`, such as no permission or a broken link, into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{setting}: {error.filename} cannot be read ({error.strerror}); make it readable, or "
            "move it elsewhere"
        ) from None


def _some(names: list[str]) -> str:
    # Hidden files last: they are hardly ever missed.
    names = sorted(names, key=lambda name: (name.startswith("."), name))
    others = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {others:,} more" if others > 0 else "")


def _below(folder: Path, setting: str) -> tuple[list[Path], list[str]]:
    """Return the data files under a folder, and the names of what is left out."""
    names, left_out = _walk(folder)
    found: list[Path] = []
    first_names: dict[tuple[int, int], Path] = {}
    saved: dict[Path, set[str] | None] = {}
    for name in names:
        file = folder / name
        form = filenames.unread_form(file)
        is_data = suffix_of(file) or form
        if not is_data or file.name.startswith(".") or filenames.is_about_data(file):
            left_out.append(str(name))
            continue
        status = file.stat()
        if form:
            raise UserError(f"{setting}: {file} {form}")
        first = first_names.setdefault((status.st_dev, status.st_ino), name)
        if file.parent not in saved:
            saved[file.parent] = _saved_files(file.parent, setting)
        if first != name:
            left_out.append(f"{name} (the same file as {first})")
        elif not file.is_file():
            left_out.append(f"{name} (not a file)")
        elif status.st_size == 0:
            left_out.append(f"{name} (empty)")
        elif _is_stale(file, saved[file.parent]):
            left_out.append(f"{name} (not part of the saved dataset)")
        else:
            _check_is_data(file, setting)
            found.append(file)
    _check_copies(found, setting)
    return found, left_out


def _check_copies(files: list[Path], setting: str) -> None:
    """Raise `UserError` for a file that is next to its compressed copy."""
    firsts: dict[str, Path] = {}
    for file in files:
        first = firsts.setdefault(filenames.plain_name(file), file)
        if first != file and (is_compressed(first) or is_compressed(file)):
            raise UserError(
                f"{setting}: {file} is next to {first.name}; move one of them out of the "
                "folder, or the same text is read twice"
            )


def _saved_files(folder: Path, setting: str) -> set[str] | None:
    """Return the files that save_to_disk of `datasets` wrote to a folder, or None."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = {entry["filename"] for entry in state["_data_files"]}
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
    if missing := sorted(name for name in names if not (folder / name).exists()):
        raise UserError(
            f"{setting}: {folder / missing[0]} does not exist, but state.json lists it; "
            "copy the folder again"
        )
    return names


def _is_stale(file: Path, saved: set[str] | None) -> bool:
    """Return whether an arrow file is a cache of `datasets`: the data would be read twice."""
    if suffix_of(file) != ".arrow":
        return False
    return fnmatchcase(file.name, "cache-*.arrow") if saved is None else file.name not in saved


def _check_is_data(file: Path, setting: str) -> None:
    """Raise `UserError` for a Git LFS pointer, as in a clone without Git LFS."""
    if file.is_file() and file.stat().st_size < 200 and file.read_bytes().startswith(_POINTER):
        raise UserError(
            f"{setting}: {file} is a Git LFS pointer, not the data; run git lfs pull there"
        )


def _walk(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the files under a folder, as relative paths, and the folders that are left out."""

    def fail(error: OSError) -> NoReturn:
        raise error

    files: list[Path] = []
    left_out: list[str] = []
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        below = Path(place).relative_to(folder)
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:
            # A link back to a folder above, or to one beside.
            left_out.append(f"{below}/ (a link to a folder that is already read)")
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Editors and notebooks keep copies in hidden folders.
        hidden = {name for name in folders if name.startswith((".", "__"))}
        left_out += [f"{below / name}/" for name in sorted(hidden)]
        folders[:] = sorted(set(folders) - hidden)
        files += [below / name for name in names]
    return sorted(files), left_out
