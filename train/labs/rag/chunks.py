"""Chunks: parts of a passage that fit into the encoder, cut at the ends of sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from runfolder.errors import UserError

# The end of a sentence, with its closing quotes and brackets; or of a line.
SENTENCE_END = re.compile("[.!?\u2026][\"'\u201d\u2019)\\]]*(?=\\s)|[\u3002\uff01\uff1f]|\\n")
# A title may take 1 / TITLE_PART of a chunk; the rest of a longer one is cut off.
TITLE_PART = 4


@dataclass(kw_only=True)
class ChunkSettings:
    """How passages are cut for the encoder."""

    length: int = 128
    """Tokens in a chunk, with its title and the encoder's special tokens."""
    overlap: int = 32
    """Tokens that a chunk repeats from the previous one, so that no thought is cut in two."""

    def __post_init__(self) -> None:
        if not 16 <= self.length <= 8192:
            raise UserError(f"chunks.length: {self.length} is not between 16 and 8192")
        if self.overlap < 0:
            raise UserError(f"chunks.overlap: {self.overlap} is negative")
        if self.overlap > self.length // 2:
            raise UserError(
                f"chunks.overlap: {self.overlap} is more than half of the {self.length} tokens of "
                f"a chunk; try --chunks.overlap {self.length // 8}"
            )


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a passage: where it is, and the number of tokens that the encoder reads."""

    passage: int
    """The passage's number."""
    start: int
    """Its first character in the passage's text."""
    end: int
    """One past its last."""
    title_end: int
    """One past the last character of the title that the encoder reads with it."""
    tokens: int
    """Its tokens, with the title and the special tokens; at most `ChunkSettings.length`."""


def titled(title: str, text: str) -> str:
    """Return what the encoder reads for a chunk: its text after the passage's title."""
    title = readable(title)
    return f"{title}: {text}" if title else text


def readable(title: str) -> str:
    """Return a title without the underscores that Wikipedia's titles have."""
    return " ".join(title.replace("_", " ").split())


def cut(
    passage: int, title: str, text: str, *, tokenizer: Tokenizer, settings: ChunkSettings
) -> Iterator[Chunk]:
    """Yield the chunks of a passage in order; at least one, and together all of its text.

    A chunk ends where a sentence does, if one ends in its second half, else between two words. The
    next begins with the last sentences of the previous one, as many as fit into `overlap` tokens.
    `tokenizer` must neither truncate nor pad.
    """

    def length_of(start: int, end: int) -> int:
        return len(tokenizer.encode(titled(title, text[start:end])).ids)

    title = short_title(title, tokenizer, settings)
    boundaries = _Boundaries(text, tokenizer)
    budget = max(1, settings.length - length_of(0, 0))
    overlap = min(settings.overlap, budget // 2)
    start = 0
    while True:
        end = boundaries.last(start + budget - budget // 2, start + budget)
        # On its own, a part of a text can have other tokens than within the text.
        while (tokens := length_of(*boundaries.span(start, end))) > settings.length:
            if end - start <= 1:
                tokens = settings.length  # which the encoder cuts off
                break
            end = boundaries.last(start + 1, end - 1, sentences=False)
        first, last = boundaries.span(start, end)
        yield Chunk(passage=passage, start=first, end=last, title_end=len(title), tokens=tokens)
        start = boundaries.first(max(start + 1, end - overlap), end) if overlap else end
        # Several tokens can form one character, or the space before it.
        while start < boundaries.count and boundaries.span(start, start + 1)[0] <= first:
            start += 1
        if end >= boundaries.count or start >= boundaries.count:
            return


def short_title(title: str, tokenizer: Tokenizer, settings: ChunkSettings) -> str:
    """Return a title, shortened to its part of a chunk."""
    offsets = tokenizer.encode(title, add_special_tokens=False).offsets
    room = settings.length // TITLE_PART
    return title if len(offsets) <= room else title[: offsets[room - 1][1]].rstrip()


class _Boundaries:
    """The places between a text's tokens, by number: place i is before token i."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self.text = text
        self.offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        self.count = len(self.offsets)
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        self._sentences, self._words = {self.count}, {self.count}
        number = 0
        for place in range(1, self.count):
            before, after = self.offsets[place - 1][1], self.offsets[place][0]
            while number < len(ends) and ends[number] < before:
                number += 1
            if number < len(ends) and ends[number] <= after:
                self._sentences.add(place)
            # Some tokenizers include the space before a word in its token.
            if text[before : after + 1][:1].isspace() or before < after:
                self._words.add(place)

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Return the characters of the tokens from place `start` to place `end`."""
        if self.count == 0:
            return 0, len(self.text)
        first, last = self.offsets[start][0], self.offsets[end - 1][1]
        stretch = self.text[first:last]
        first += len(stretch) - len(stretch.lstrip())
        return first, max(first, last - (len(stretch) - len(stretch.rstrip())))

    def last(self, low: int, high: int, *, sentences: bool = True) -> int:
        """Return the best place to end in [low, high]: of a sentence, of a word, or `high`."""
        if high >= self.count:
            return self.count
        for places in (self._sentences, self._words) if sentences else (self._words,):
            for place in range(high, low - 1, -1):
                if place in places:
                    return place
        return high

    def first(self, low: int, high: int) -> int:
        """Return the best place to begin in [low, high): of a sentence, of a word, or `low`."""
        for places in (self._sentences, self._words):
            for place in range(low, high):
                if place in places:
                    return place
        return low
