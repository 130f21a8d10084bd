"""How much of the text that measures is in the text that is trained on as well, line by line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator
from typing import NamedTuple

from train.engine.data import Piece

# Shorter lines ("return None", a heading) are in any two texts. A row of one line always counts.
SHORTEST_LINE = 25
# Lines that are held: some 70 MB. Of more lines, those with the smallest digests are
# taken, which are a fair sample and the same one each time.
MAX_LINES = 2**18


def share(train: Callable[[], Iterable[Piece]], held_out: Callable[[], Iterable[Piece]]) -> float:
    """Return which share of the characters of `held_out` stands in lines that `train` has too.

    Lines are equal if their words are. Memory does not grow with either text.
    """
    shortest = SHORTEST_LINE
    wanted = _sample(_lines(held_out(), shortest))
    if not wanted:
        shortest = 1
        wanted = _sample(_lines(held_out(), shortest))
    total = sum(line.size for line in wanted.values())
    # Most lines of a corpus are told from all of these by their first words.
    starts = {line.start for line in wanted.values()}
    for line in _lines(train(), shortest, starts):
        wanted.pop(line.digest, None)
        if not wanted:
            break
    return 1 - sum(line.size for line in wanted.values()) / total if total else 0.0


def share_of_texts(train: Iterable[str], held_out: Iterable[str]) -> float:
    """Return which share of the texts of `held_out` is in `train` too, word for word."""
    known = {_digest(text.split()) for text in train}
    found = [_digest(text.split()) in known for text in held_out]
    return sum(found) / len(found) if found else 0.0


def warning(share: float, held_out: str, train: str, what: str) -> str | None:
    """Return the line that says a share, if it is one to speak of: at least half a percent."""
    if share < 0.005:
        return None
    amount = "all" if share == 1 else f"{share:.1%}"
    return (
        f"warning: {held_out}: {amount} of its {what} in {train} as well; what is measured on "
        "it looks better than it is"
    )


class _Line(NamedTuple):
    digest: int
    size: int
    """Its characters that are no white space, in all its copies."""
    start: int
    """Follows from its first words; another in another process."""


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
    """Yield the lines that count; of some starts only, if they are given."""
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
