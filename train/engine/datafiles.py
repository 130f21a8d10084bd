"""Which files a path in the settings means, and what is left out of it; the bytes of such a file.

A folder means what the `datasets` library reads in it, and nothing is left out without its name.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from train.engine.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# Those two are read by jumping about in them, which a compressed stream does not allow.
_NOT_STREAMED = (".parquet", ".arrow")
# `datasets` leaves these out as well, apart from the last, which its save_to_disk writes.
_ABOUT_THE_DATA = (
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
)  # fmt: skip
_FOR_READERS = re.compile(r"(readme|licen[cs]e|copying)([._-].*)?\.txt(\.\w+)?", re.IGNORECASE)
_POINTER = b"version https://git-lfs"
_NAMES_SHOWN = 3


def _open_with_arrow(file: Path) -> IO[bytes]:
    import pyarrow

    codec = {".zst": "zstd", ".lz4": "lz4"}[file.suffix.lower()]
    stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), codec)
    return io.BufferedReader(stream)


_DECOMPRESS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".zst": _open_with_arrow,
    ".lz4": _open_with_arrow,
}
_UNKNOWN_WRAPPERS = (".zip", ".7z", ".rar", ".br", ".z", ".sz", ".lzo", ".gpg", ".enc", ".part")
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")


@dataclass(frozen=True, kw_only=True)
class DataFiles:
    """The files that a setting means, in a fixed order, and the names of what is left out."""

    setting: str
    files: list[Path]
    left_out: list[str]

    def describe(self, what: str) -> str:
        """Return the line that says what was read; `what` counts it: 3,400 documents."""
        count = len(self.files)
        line = f"{self.setting}: {count:,} {'file' if count == 1 else 'files'}, {what}"
        if not self.left_out:
            return line
        # What is hidden is hardly ever missed.
        names = sorted(self.left_out, key=lambda name: (name.startswith("."), name))
        others = len(names) - _NAMES_SHOWN
        shown = ", ".join(names[:_NAMES_SHOWN]) + (f" and {others:,} more" if others > 0 else "")
        return f"{line}; left out: {shown}"


def suffix_of(file: Path) -> str | None:
    """Return which of `SUFFIXES` a file has, in any case and below a compression; None: none."""
    suffix = file.suffix.lower()
    if suffix in _DECOMPRESS:
        inner = Path(file.stem).suffix.lower()
        return inner if inner in SUFFIXES and inner not in _NOT_STREAMED else None
    return suffix if suffix in SUFFIXES else None


def find(given: str, setting: str) -> DataFiles:
    """Return the files that `given` (a file or a folder) means.

    A folder means all files below it with one of `SUFFIXES`, compressed or not, through links
    too. Hidden ones are left out, folders such as __pycache__, and what describes the data
    (README.txt, dataset_info.json); a file that is there twice by links counts once.

    Raises:
        UserError: there is none, its kind is unknown, or data lies in a form that is not read.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        found, left_out = _below(path, setting)
        if not found:
            also = DataFiles(setting=setting, files=[], left_out=left_out).describe("")
            raise UserError(
                f"{setting}: {path} holds no {', '.join(SUFFIXES)} file"
                + also.partition(",")[2].strip()
            )
        return DataFiles(setting=setting, files=found, left_out=left_out)
    if not path.exists():
        raise UserError(f"{setting}: {path} does not exist")
    if suffix_of(path) is None:
        _refuse(path, setting)
    _check_is_data(path, setting)
    return DataFiles(setting=setting, files=[path], left_out=[])


def find_rows(given: str, setting: str) -> DataFiles:
    """Return the files that `given` means, all of which have columns.

    Raises:
        UserError: one is a txt file; or as `find`.
    """
    found = find(given, setting)
    if texts := [file for file in found.files if suffix_of(file) == ".txt"]:
        raise UserError(f"{setting}: {texts[0]} has no columns; give jsonl, csv or parquet")
    return found


def apart(training: DataFiles, held_out: DataFiles) -> tuple[DataFiles, DataFiles]:
    """Return both without what they share: a file within the other's folder, or a copy of one.

    Training data loses it to the data that measures, unless that is the larger folder, with the
    training data within it. Two settings that mean the same keep it: that is what was asked for.
    """
    ours, theirs = _identities(training.files, held_out.files)
    shared = set(ours) & set(theirs)
    if not shared or shared == set(ours) == set(theirs):
        return training, held_out
    if shared == set(ours):
        return training, _without(held_out, theirs, shared, training.setting)
    return _without(training, ours, shared, held_out.setting), held_out


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for its bytes, decompressed.

    Raises:
        UserError: it cannot be read, or is damaged; also while it is read.
    """
    try:
        with cast("IO[bytes]", _DECOMPRESS.get(file.suffix.lower(), _open)(file)) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(file, error) from None
    except OSError as error:
        # The system's errors have a text of their own, those of gzip, bz2 and Arrow have not.
        if error.strerror is None:
            raise _damaged(file, error) from None
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _open(file: Path) -> IO[bytes]:
    return file.open("rb")


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file}: is cut short or damaged, or no {file.suffix} file ({error}); copy it again"
    )


def _refuse(file: Path, setting: str) -> NoReturn:
    name = file.name.lower()
    if any(name.endswith(suffix) or f"{suffix}." in name for suffix in _ARCHIVES):
        raise UserError(f"{setting}: {file} is an archive; unpack it and give the folder")
    if _is_wrapped(file):
        raise UserError(f"{setting}: {file} is not read in this form; decompress it first")
    raise UserError(
        f"{setting}: {file} is of no kind that is read; convert it to {', '.join(SUFFIXES)}"
    )


def _is_wrapped(file: Path) -> bool:
    """Return whether a file is data, by its name, in a form that is not read."""
    return (
        suffix_of(file) is None
        and Path(file.stem).suffix.lower() in SUFFIXES
        and file.suffix.lower() in (*_DECOMPRESS, *_UNKNOWN_WRAPPERS)
    )


def _below(folder: Path, setting: str) -> tuple[list[Path], list[str]]:
    """Return the data files below a folder, and the names of what is left out."""
    names, left_out = _walk(folder)
    found: list[Path] = []
    first_names: dict[tuple[int, int], str] = {}
    for name in names:
        file = folder / name
        described = file.name.lower() in _ABOUT_THE_DATA or _FOR_READERS.fullmatch(file.name)
        if described or file.name.startswith(".") or not (suffix_of(file) or _is_wrapped(file)):
            left_out.append(str(name))
            continue
        try:
            status = file.stat()
        except OSError as error:
            raise UserError(
                f"{setting}: {file} cannot be read ({error.strerror}); mend or delete it"
            ) from None
        if _is_wrapped(file):
            _refuse(file, setting)
        first = first_names.setdefault((status.st_dev, status.st_ino), str(name))
        if first != str(name):
            left_out.append(f"{name} (the same file as {first})")
        elif not file.is_file():
            left_out.append(f"{name} (not a file)")
        elif status.st_size == 0:
            left_out.append(f"{name} (empty)")
        else:
            _check_is_data(file, setting)
            found.append(file)
    for file in found:
        if file.suffix.lower() in _DECOMPRESS and file.with_suffix("") in found:
            raise UserError(
                f"{setting}: {file} lies beside {file.stem}; move one of them out of the "
                "folder, or the same text is read twice"
            )
    return found, left_out


def _check_is_data(file: Path, setting: str) -> None:
    """Raise `UserError` for what a clone without Git LFS has instead of a large file."""
    if file.is_file() and file.stat().st_size < 200 and file.read_bytes().startswith(_POINTER):
        raise UserError(
            f"{setting}: {file} is a pointer of Git LFS, not the data; run git lfs pull there"
        )


def _walk(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the files below a folder, by names below it, and the folders that are left out."""

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
            left_out.append(f"{below}/ (a link to a folder that is read already)")
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Editors and notebooks keep copies in hidden folders.
        hidden = {name for name in folders if name.startswith((".", "__"))}
        left_out += [f"{below / name}/" for name in sorted(hidden)]
        folders[:] = sorted(set(folders) - hidden)
        files += [below / name for name in names]
    return sorted(files), left_out


def _identities(first: list[Path], second: list[Path]) -> tuple[list[object], list[object]]:
    """Return what each file holds, which is read where both lists have files of that size."""
    sizes = [{file.stat().st_size for file in files} for files in (first, second)]
    candidates = (sizes[0] & sizes[1]) - {0}

    def identity(file: Path) -> object:
        status = file.stat()
        if status.st_size not in candidates:
            return status.st_dev, status.st_ino
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return [identity(file) for file in first], [identity(file) for file in second]


def _without(
    data: DataFiles, identities: list[object], shared: set[object], owner: str
) -> DataFiles:
    pairs = list(zip(data.files, identities, strict=True))
    names = [f"{file.name} (it is in {owner})" for file, identity in pairs if identity in shared]
    return replace(
        data,
        files=[file for file, identity in pairs if identity not in shared],
        left_out=[*data.left_out, *names],
    )
