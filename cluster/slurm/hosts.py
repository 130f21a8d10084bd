"""Lists of nodes as Slurm writes them: node[1-3,7],login."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

# A limit for a hostile or broken answer; no cluster has as many nodes.
MOST = 100_000


def expand(text: str) -> list[str]:
    """Return the names in a list of nodes; drop `(null)`, `N/A` and `None`."""
    names: list[str] = []
    # A comma inside brackets does not separate names.
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        pieces = re.split(r"\[([^\[\]]*)\]", part)
        choices = [
            list(itertools.islice(_numbers(piece), MOST)) if i % 2 else [piece]
            for i, piece in enumerate(pieces)
        ]
        for words in itertools.product(*choices):
            if len(names) == MOST:
                return names
            names.append("".join(words))
    return [name for name in names if name not in ("(null)", "N/A", "None")]


def compact(names: Iterable[str]) -> str:
    """Return names as one list, consecutive numbers as a range."""
    stems: dict[tuple[str, int], list[int]] = {}
    plain = []
    for name in sorted(set(names)):
        found = re.fullmatch(r"(.*?)(\d{1,9})", name)
        if found is None:
            plain.append(name)
            continue
        # node01 and node1 are two nodes: those with a leading 0 have a fixed width.
        width = len(found[2]) if found[2].startswith("0") else 0
        stems.setdefault((found[1], width), []).append(int(found[2]))
    for (stem, width), numbers in stems.items():
        ranges = list(_ranges(sorted(numbers), width))
        one = len(ranges) == 1 and "-" not in ranges[0]
        plain.append(stem + (ranges[0] if one else f"[{','.join(ranges)}]"))
    return ",".join(sorted(plain))


def _numbers(text: str) -> Iterator[str]:
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not dash or not (first.isdecimal() and last.isdecimal()):
            yield part
            continue
        for number in range(int(first[:9]), int(last[:9]) + 1):
            yield f"{number:0{len(first)}}"


def _ranges(numbers: list[int], width: int) -> Iterator[str]:
    start = numbers[0]
    for number, after in itertools.pairwise([*numbers, -1]):
        if after != number + 1:
            first, last = f"{start:0{width}}", f"{number:0{width}}"
            yield first if first == last else f"{first}-{last}"
            start = after
