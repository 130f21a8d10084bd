"""What the training data and the held-out data have in common: whole files, and lines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from train.engine.data import Piece
from train.engine.datafiles import DataFiles, refusing

# Increment when the same texts give a different share.
FORMAT = 2

# Shorter lines ("return None", a heading) occur in any two texts. A row of one line always counts.
SHORTEST_LINE = 25
# Lines kept in memory: about 70 MB. Of more lines, those with the smallest digests are
# kept, which is a fair sample and the same one each time.
MAX_LINES = 2**18
# Of the training text: about 40 seconds; all of a large text would take hours.
MAX_CHARACTERS = 2 * 10**9


# ---- files ----------------------------------------------------------------------------------


def apart(training: DataFiles, held_out: DataFiles) -> tuple[DataFiles, DataFiles]:
    """Return both without what they share: a file within the other's folder, or a copy of one.

    The training data loses it, unless the held-out data includes all of the training data and
    more; then the held-out data does. Two settings with the same files keep them, as requested.

    Raises:
        UserError: a file cannot be read.
    """
    candidates = (_sizes(training) & _sizes(held_out)) - {0}
    ours, theirs = (_identities(data, candidates) for data in (training, held_out))
    shared = set(ours) & set(theirs)
    if not shared or shared == set(ours) == set(theirs):
        return training, held_out
    if shared == set(ours):
        return training, _without(held_out, theirs, shared, training.setting)
    return _without(training, ours, shared, held_out.setting), held_out


def _sizes(data: DataFiles) -> set[int]:
    with refusing(data.setting):
        return {file.stat().st_size for file in data.files}


def _identities(data: DataFiles, candidates: set[int]) -> list[object]:
    """Return an identity of each file; it is a hash if its size is one of `candidates`."""

    def identity(file: Path) -> object:
        status = file.stat()
        if status.st_size not in candidates:
            return status.st_dev, status.st_ino
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with refusing(data.setting):
        return [identity(file) for file in data.files]


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


# ---- lines ----------------------------------------------------------------------------------


class Beginnings:
    """The beginnings of texts: an equal part of each, `limit` characters in all.

    Shorter texts leave the rest of their part to those after them.
    """

    def __init__(self, texts: Sequence[Callable[[], Iterable[Piece]]], limit: int) -> None:
        self._texts = texts
        self._limit = limit
        self.are_all = True
        """Whether nothing was left out, once they are read."""

    def __iter__(self) -> Iterator[Piece]:
        left = self._limit
        for number, read in enumerate(self._texts):
            part = left // (len(self._texts) - number)
            for piece in read():
                if part <= 0:
                    self.are_all = False
                    break
                part -= len(piece.text)
                left -= len(piece.text)
                yield piece


def share(train: Callable[[], Iterable[Piece]], held_out: Callable[[], Iterable[Piece]]) -> float:
    """Return the share of the characters of `held_out` in lines that `train` has too.

    Lines are equal if their words are. Memory does not grow with either text.
    """
    shortest = SHORTEST_LINE
    wanted = _sample(_lines(held_out(), shortest))
    if not wanted:
        shortest = 1
        wanted = _sample(_lines(held_out(), shortest))
    total = sum(line.size for line in wanted.values())
    # The first words rule out most lines of a corpus.
    starts = {line.start for line in wanted.values()}
    for line in _lines(train(), shortest, starts):
        wanted.pop(line.digest, None)
        if not wanted:
            break
    return 1 - sum(line.size for line in wanted.values()) / total if total else 0.0


def share_of_texts(train: Iterable[str], held_out: Iterable[str]) -> float:
    """Return the share of the texts of `held_out` that are in `train` too, word for word."""
    known = {_digest(text.split()) for text in train}
    found = [_digest(text.split()) in known for text in held_out]
    return sum(found) / len(found) if found else 0.0


def warning(share: float, held_out: str, train: str, what: str) -> str | None:
    """Return a warning about a share, or None if it is below half a percent."""
    if share < 0.005:
        return None
    amount = "all" if share == 1 else f"{share:.1%}"
    return (
        f"warning: {held_out}: {amount} of its {what} in {train} as well; results measured on "
        "it look better than they are"
    )


class _Line(NamedTuple):
    digest: int
    size: int
    """Its non-blank characters, over all its copies."""
    start: int
    """A hash of its first words; differs between processes."""


def _sample(lines: Iterable[_Line]) -> dict[int, _Line]:
    """Return the lines by their digests, no more than `MAX_LINES`."""
    found: dict[int, _Line] = {}
    limit = 2**64
    for line in lines:
        if line.digest >= limit:
            continue
        copies = found.get(line.digest)
        found[line.digest] = line._replace(size=line.size + copies.size) if copies else line
        if len(found) > MAX_LINES:
            limit //= 2
            found = {digest: line for digest, line in found.items() if digest < limit}
    return found


def _lines(
    pieces: Iterable[Piece], shortest: int, starts: Container[int] | None = None
) -> Iterator[_Line]:
    """Yield the lines that count; only those with one of `starts`, if given."""
    for piece in pieces:
        lines = [line for line in piece.text.split("\n") if line.strip()]
        is_row = piece.starts and piece.ends and len(lines) == 1
        for line in lines:
            start = hash(tuple(line.split(maxsplit=3)[:3]))
            if starts is not None and start not in starts:
                continue
            words = line.split()
            size = sum(map(len, words))
            if is_row or size >= shortest:
                yield _Line(_digest(words), size, start)


def _digest(words: list[str]) -> int:
    # Not hash(), which differs from process to process.
    joined = " ".join(words).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest())
