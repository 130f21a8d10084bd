"""The prompt for an answer: numbered passages within a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runfolder.errors import UserError
from train.labs.rag.chunks import SENTENCE_END

INSTRUCTION = (
    "Answer the question from the passages below in a sentence or two. Name the passages that you "
    "used by their numbers, like [1]. If they do not hold the answer, say that you do not know."
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What may be cited: a passage's title and the part of its text that was found."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, the number of sources in it, and the tokens that it takes."""

    text: str
    num_sources: int
    tokens: int


def build(
    question: str, sources: Sequence[Source], *, count: Callable[[str], int], budget: int
) -> Prompt:
    """Return a prompt of at most `budget` tokens (as `count` counts them) with the best sources.

    The sources, the best first, get the numbers from 1 on. The first that does not fit is cut where
    a sentence ends, and those after it are left out.

    Raises:
        UserError: not even a sentence of the first source fits.
    """
    kept: list[Source] = []
    for source in sources:
        whole = [*kept, source]
        if count(_text(question, whole)) <= budget:
            kept = whole
            continue
        for text in _shorter(source.text):
            shortened = [*kept, Source(title=source.title, text=f"{text} ...")]
            if count(_text(question, shortened)) <= budget:
                kept = shortened
                break
        break
    if sources and not kept:
        raise UserError(
            f"--max_prompt_tokens: {budget} tokens are too few for the question and a sentence of "
            f"a passage; the question alone takes {count(_text(question, []))} (the generator's "
            "context is also a limit)"
        )
    text = _text(question, kept)
    return Prompt(text=text, num_sources=len(kept), tokens=count(text))


def _text(question: str, sources: Sequence[Source]) -> str:
    parts = [INSTRUCTION]
    for number, source in enumerate(sources, start=1):
        head = f"[{number}] {source.title}".rstrip()
        parts.append(f"{head}\n{source.text}")
    return "\n\n".join([*parts, f"Question: {question}\nAnswer:"])


def _shorter(text: str) -> list[str]:
    """Return the beginnings of a text that end with a sentence, the longest first."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return [text[:end].rstrip() for end in reversed(ends) if text[end:].strip()]
