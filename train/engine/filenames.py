"""What a data file's name says: how it is read, why it cannot be read, and its split."""

from __future__ import annotations

import re
from pathlib import Path

from train.engine.compression import PROGRAMS, is_compressed

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# These two need random access, which a compressed stream does not allow.
_NOT_STREAMED = (".parquet", ".arrow")
# `datasets` leaves these out as well, apart from the last, which its save_to_disk writes.
_ABOUT_THE_DATA = (
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
)  # fmt: skip
_FOR_READERS = re.compile(r"(readme|licen[cs]e|copying)([._-].*)?\.txt(\.\w+)?", re.IGNORECASE)

_COMPRESSED = "cannot be read compressed like this; decompress it first"
_WRAPPINGS = {
    **dict.fromkeys(
        (".zip", ".tar", ".tgz", ".7z", ".rar"), "is an archive; unpack it and give the folder"
    ),
    **dict.fromkeys(
        (".part", ".partial", ".filepart", ".crdownload", ".download", ".incomplete", ".aria2"),
        "is an unfinished download; finish or delete it",
    ),
    **dict.fromkeys((".gpg", ".enc", ".age"), "is encrypted; decrypt it first"),
    **dict.fromkeys((".br", ".z", ".sz", ".snappy", ".lzo", ".zstd", ".gzip"), _COMPRESSED),
}

# The words by which `datasets` recognizes the splits of a folder.
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val", "eval", "evaluation"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")


def suffix_of(file: Path) -> str | None:
    """Return which of `SUFFIXES` a file has, in any case, compressed or not; or None."""
    suffix = file.suffix.lower()
    if is_compressed(file):
        inner = Path(file.stem).suffix.lower()
        return inner if inner in SUFFIXES and inner not in _NOT_STREAMED else None
    return suffix if suffix in SUFFIXES else None


def unread_form(file: Path) -> str | None:
    """Return the message about a data file in an unsupported form, or None."""
    if suffix_of(file):
        return None
    reason = None
    for suffix in reversed([suffix.lower() for suffix in file.suffixes]):
        if suffix in SUFFIXES:
            return reason or _COMPRESSED
        if suffix not in (*_WRAPPINGS, *PROGRAMS):
            return None
        # The outermost suffix counts, but an archive inside says more than a compression.
        reason = reason or _WRAPPINGS.get(suffix)
    return None


def refusal(file: Path) -> str:
    """Return the message about a file that was named but cannot be read."""
    outer = (_WRAPPINGS.get(suffix.lower()) for suffix in reversed(file.suffixes[-2:]))
    unsupported = f"has an unsupported suffix; use {', '.join(SUFFIXES)}"
    return unread_form(file) or next(filter(None, outer), unsupported)


def is_about_data(file: Path) -> bool:
    """Return whether a file describes the data next to it: README.txt, state.json."""
    return file.name.lower() in _ABOUT_THE_DATA or bool(_FOR_READERS.fullmatch(file.name))


def plain_name(file: Path) -> str:
    """Return the name that a file shares with its copies in capitals or compressed."""
    return str(file.with_suffix("") if is_compressed(file) else file).lower()


def is_of_other_split(file: Path, split: str) -> bool:
    """Return whether a file's name, or else a folder in its path, names another split.

    The words are those of `datasets`: validation_01.jsonl, dev/a.txt, my-test.csv.
    """
    own = _SPLITS.get(split, set())
    every = set().union(*_SPLITS.values())
    for part in reversed(file.parts):
        if words := every & set(_BETWEEN_WORDS.split(part.lower())):
            return bool(own) and not words & own
    return False
