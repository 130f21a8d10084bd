"""The tokens of a conversation's text, and which of them belong to its answers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from train.engine.tokenization import LoadedTokenizer

# Put before a part of a text, which some tokenizers would otherwise begin with a space of their
# own; the first that does not become one token with it.
_GUARDS = ("\n", ".", "a", "0")
Offsets = list[tuple[int, int]]


def apart(
    text: str, spans: list[tuple[int, int]], encoding: Any, tokenizer: LoadedTokenizer
) -> tuple[list[int], Offsets, int]:
    """Return the tokens of a text and their characters, and how many answers it was split at.

    `encoding` is the text's own. Where an answer begins inside a token (its question ends with a
    space, for example), the text is split: the model is asked with the tokens of the question
    alone, and has to continue with those of the answer.
    """
    # Each is a new list whenever it is asked for.
    ids, offsets = list(encoding.ids), list(encoding.offsets)
    inside = {place for a, b in offsets for place in range(a + 1, b)}
    starts = [start for start, _ in spans if start in inside]
    if not starts:
        return ids, offsets, 0
    ids, offsets = [], []
    for first, last in pairwise([0, *starts, len(text)]):
        for guard in _GUARDS if first else ("",):
            part = tokenizer.tokenizer.encode(guard + text[first:last], add_special_tokens=False)
            places = part.offsets
            if not any(a < len(guard) < b for a, b in places):
                break
        shift = first - len(guard)
        for token, (a, b) in zip(part.ids, places, strict=True):
            if b > len(guard):
                ids.append(token)
                offsets.append((a + shift, b + shift))
    return ids, offsets, len(starts)


def mark_answers(
    spans: list[tuple[int, int]],
    ids: list[int],
    offsets: Offsets,
    text: str,
    tokenizer: LoadedTokenizer,
) -> tuple[list[int | None], list[int]]:
    """Return for each token the number of its answer, or None, and the tokens that end answers.

    A token belongs to the answer in which it begins; so does the special token after the answer,
    with the white space before it: that is how the model learns to stop.
    """
    found: list[int | None] = [None] * len(ids)
    end_ids = []
    for number, (start, end) in enumerate(spans):
        after = len(ids)
        for i, (a, b) in enumerate(offsets):
            if a >= end:
                after = i
                break
            if a >= start and b > a:
                found[i] = number
        for i in range(after, len(ids)):
            if ids[i] in tokenizer.special_ids and ids[i] not in tokenizer.starts:
                found[after : i + 1] = [number] * (i + 1 - after)
                end_ids.append(ids[i])
                break
            a, b = offsets[i]
            if text[a:b].strip():
                break
    return found, end_ids
