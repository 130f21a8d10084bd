"""Conversations as tokens, with a mark for each that is learned; several of them in a row.

An example of n tokens takes n - 1 places of a row: inputs are its tokens, labels the next ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runfolder.errors import UserError
from train.engine.tokenization import LoadedTokenizer
from train.labs.chat.conversations import Conversation, Form
from train.labs.chat.packing import rows_of
from train.labs.chat.settings import ConversationSettings
from train.labs.chat.template import Template
from train.labs.chat.tokens import apart, mark_answers

# Increment when the same conversations give other files.
FORMAT = 1
_IGNORED = -100


@dataclass(kw_only=True)
class Summary:
    """What an examples folder's meta.json says."""

    format: int = FORMAT
    dtype: str
    sequence_length: int
    packing: bool
    columns: str = ""
    """Which columns were read, and which were not."""
    num_conversations: int = 0
    num_answers: int = 0
    """Answers of which at least one token is learned."""
    num_tokens: int = 0
    num_targets: int = 0
    """Tokens that are learned."""
    num_bytes: int = 0
    """In UTF-8, of the text that is learned."""
    num_cut: int = 0
    num_left_out: int = 0
    """Too long, or without anything to learn after the cut."""
    num_split: int = 0
    """Answers that began inside a token, where the text is split."""
    num_unended: int = 0
    """Answers after which the template writes no end token."""
    vocab_size: int = 0
    """The largest id among the tokens, plus one."""
    end_ids: list[int] = field(default_factory=list)
    """The tokens that end an answer."""
    spelled: dict[str, int] = field(default_factory=dict)
    """In how many turns a special token is spelled, which it becomes."""
    num_rows: int = 0

    def describe(self) -> str:
        """Return a one-line summary."""
        used = (self.num_tokens - self.num_examples) / (self.num_rows * self.sequence_length)
        told = [
            f"{self.columns}; {_many(self.num_conversations, 'conversation')}, "
            f"{_many(self.num_answers, 'answer')}, "
            f"{self.num_targets:,} of {self.num_tokens:,} tokens are learned",
            f"{_many(self.num_rows, 'block')} of {self.sequence_length} tokens, {used:.0%} full",
        ]
        if self.num_cut:
            told.append(f"{self.num_cut:,} cut to the length of a block")
        if self.num_left_out:
            told.append(f"{self.num_left_out:,} left out: too long, or no answer within a block")
        if self.num_split:
            told.append(
                f"{_many(self.num_split, 'answer')} would begin inside a token: split there, as "
                "when the model is asked"
            )
        if self.num_unended:
            told.append(
                f"after {_many(self.num_unended, 'answer')} the chat template writes no end "
                "token: the model does not learn to stop there"
            )
        told += [
            f"'{token}' is spelled in {_many(count, 'turn')}, and becomes that token"
            for token, count in self.spelled.items()
        ]
        return "; ".join(told)

    @property
    def num_examples(self) -> int:
        """Conversations that are in the rows."""
        return self.num_conversations - self.num_left_out


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def write(
    conversations: Iterable[Conversation],
    form: Form,
    template: Template,
    tokenizer: LoadedTokenizer,
    settings: ConversationSettings,
    sequence_length: int,
    folder: Path,
    name: str,
) -> None:
    """Write the examples to `folder`: tokens.bin, learned.bin, three arrays and meta.json.

    `form` knows which columns were read, once they are.

    Raises:
        UserError: the template does not take a conversation, or none is left to learn from.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    summary = Summary(dtype=dtype.name, sequence_length=sequence_length, packing=settings.packing)
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    special = [token for token, i in vocabulary.items() if i in tokenizer.special_ids]
    spelled: Counter[str] = Counter()
    ends: set[int] = set()
    lengths = []
    left = iter(conversations)
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "learned.bin").open("wb") as marks:
        while some := list(islice(left, 64)):
            written = []
            for conversation in some:
                try:
                    written.append(template.write_with_answers(conversation, settings.learn))
                except UserError as error:
                    form.leave_out(error)
                    continue
                summary.num_conversations += 1
                for turn in conversation.turns:
                    spelled.update(token for token in special if token in turn["content"])
            texts = [text for text, _ in written]
            encodings = tokenizer.tokenizer.encode_batch(texts, add_special_tokens=False)
            for (text, spans), encoding in zip(written, encodings, strict=True):
                ids, offsets, num_split = apart(text, spans, encoding, tokenizer)
                answer_of, end_ids = mark_answers(spans, ids, offsets, text, tokenizer)
                kept = _kept(ids, sequence_length + 1, settings.too_long, tokenizer)
                learned = [answer_of[i] for i in kept]
                answers = set(learned[1:]) - {None}
                if not answers:
                    summary.num_left_out += 1
                    continue
                summary.num_cut += len(kept) < len(ids)
                # A character can be several tokens; what ends an answer is no text.
                spots = {
                    offsets[i]
                    for i in kept[1:]
                    if answer_of[i] is not None and ids[i] not in tokenizer.special_ids
                }
                summary.num_bytes += sum(len(text[a:b].encode()) for a, b in spots)
                ids = [ids[i] for i in kept]
                tokens.write(np.asarray(ids, dtype=dtype).tobytes())
                marks.write(bytes(number is not None for number in learned))
                lengths.append(len(ids))
                summary.num_answers += len(answers)
                summary.num_tokens += len(ids)
                summary.vocab_size = max(summary.vocab_size, max(ids) + 1)
                summary.num_targets += len(learned[1:]) - learned[1:].count(None)
                ends.update(end_ids)
                summary.num_split += num_split
                summary.num_unended += len(spans) - len(end_ids)
    if not summary.num_conversations:
        hint = "" if settings.validation else ", or a smaller --data.hold_back_every"
        raise UserError(f"{name}: there is none; give more rows{hint}")
    if not lengths:
        raise UserError(
            f"{name}: all {summary.num_conversations:,} conversations are left out: too long, or "
            "no answer within a block; give a larger --data.sequence_length, or another "
            "--data.too_long"
        )
    order, firsts = rows_of(np.asarray(lengths) - 1, sequence_length, packing=settings.packing)
    summary.columns = form.describe()
    summary.end_ids = sorted(ends)
    summary.spelled = dict(spelled)
    summary.num_rows = len(firsts) - 1
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(lengths)]))
    np.save(folder / "order.npy", order)
    np.save(folder / "firsts.npy", firsts)
    (folder / "meta.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")


def _kept(
    ids: list[int], room: int, too_long: str, tokenizer: LoadedTokenizer
) -> range | list[int]:
    """Return which tokens of a conversation are kept, at most `room`."""
    if len(ids) <= room:
        return range(len(ids))
    if too_long == "leave_out":
        return []
    if too_long == "cut_end":
        return range(room)
    # The model has never seen a text without its start.
    first = [0] if ids[:1] == tokenizer.starts else []
    return [*first, *range(len(ids) - room + len(first), len(ids))]


class Examples:
    """The rows of an examples folder, as `batches.Rows`."""

    def __init__(self, folder: Path) -> None:
        """Map the folder.

        Raises:
            UserError: it is not one, or was cut short.
        """
        try:
            self.summary = Summary(**json.loads((folder / "meta.json").read_text()))
            self._tokens = np.memmap(folder / "tokens.bin", self.summary.dtype, "r")
            self._learned = np.memmap(folder / "learned.bin", np.uint8, "r")
            self._starts, self._order, self._firsts = (
                np.load(folder / f"{name}.npy", mmap_mode="r")
                for name in ("starts", "order", "firsts")
            )
        except (OSError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder}: does not hold conversations ({error}); delete it, and it will be "
                "rebuilt"
            ) from None
        if not len(self._tokens) == len(self._learned) == self._starts[-1]:
            raise UserError(f"{folder}: is cut short; delete it, and it will be rebuilt")
        self.sequence_length = self.summary.sequence_length

    @property
    def num_full(self) -> int:
        """All rows: each has something to learn."""
        return self.summary.num_rows

    num_all = num_full

    @property
    def positions_per_target(self) -> float:
        """Tokens that are computed, padding included, for each that is learned."""
        return self.summary.num_rows * self.sequence_length / self.summary.num_targets

    def bytes_of(self, num_tokens: float) -> float:
        """Return the bytes that `num_tokens` learned tokens stand for."""
        return self.summary.num_bytes * num_tokens / self.summary.num_targets

    def rows(self, indices: list[int]) -> tuple[npt.NDArray[np.int64], ...]:
        """Return inputs, labels and, with packing, positions, each of shape (len(indices), T).

        Labels are -100 where nothing is learned: the turns of others, and what is not filled.
        Positions restart at 0 with each example, and where the row is not filled. An index past
        the end gives a row of padding.
        """
        length = self.sequence_length
        inputs = np.zeros((len(indices), length), dtype=np.int64)
        labels = np.full((len(indices), length), _IGNORED, dtype=np.int64)
        positions = np.zeros((len(indices), length), dtype=np.int64)
        for row, index in enumerate(indices):
            place = 0
            if index < self.num_all:
                for example in self._order[self._firsts[index] : self._firsts[index + 1]]:
                    start, end = self._starts[example], self._starts[example + 1]
                    tokens = self._tokens[start:end].astype(np.int64)
                    learned = self._learned[start + 1 : end] > 0
                    to = place + len(tokens) - 1
                    inputs[row, place:to] = tokens[:-1]
                    labels[row, place:to] = np.where(learned, tokens[1:], _IGNORED)
                    positions[row, place:to] = np.arange(to - place)
                    place = to
            positions[row, place:] = np.arange(length - place)
        return (inputs, labels, positions) if self.summary.packing else (inputs, labels)
