"""Text tokenized once into a memory-mapped file of tokens; blocks of it in a computed order.

The order is a pure function of (seed, epoch) and the position one integer, so resuming at block
one million costs what resuming at block ten costs, and memory does not grow with the corpus.
"""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runfolder.errors import UserError
from train.engine.data import Piece
from train.engine.tokenization import LoadedTokenizer

FORMAT = 2
# With more bytes per token than this on average, the tokenizer dropped text: the longest tokens
# in use stand for about 80 spaces, and no text consists of those.
MAX_BYTES_PER_TOKEN = 64
_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class PackedText:
    """What a packed folder's meta.json says."""

    format: int
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    vocab_size: int
    """The largest id among the tokens, plus one; in format 1, among the tokenizer's."""
    num_unknown: int = 0
    """Unknown tokens: text that the tokenizer does not know."""
    spelled: dict[str, int] = field(default_factory=dict)
    """How often the text spells a special token that only Sluice inserts: it was taken as text."""
    read: dict[str, int] = field(default_factory=dict)
    """How often the text spells an end token that was taken as that token."""

    def describe(self) -> str:
        """Return a one-line summary of the packed text."""
        plural = "" if self.num_documents == 1 else "s"
        told = [
            f"{self.num_documents:,} document{plural}, {self.num_bytes:,} bytes, "
            f"{self.num_tokens:,} tokens ({self.num_bytes / self.num_tokens:.2f} bytes per token)"
        ]
        if self.num_unknown:
            told.append(f"{self.num_unknown / self.num_tokens:.2%} unknown to the tokenizer")
        told += [
            f"'{token}' appears {count:,} times and is taken as text "
            "(for the token: --data.parse_special_tokens true)"
            for token, count in self.spelled.items()
        ]
        told += [
            f"'{token}' appears {count:,} times and is taken as the end token"
            for token, count in self.read.items()
        ]
        return "; ".join(told)


def pack(
    pieces: Iterable[Piece], tokenizer: LoadedTokenizer, folder: Path, source: str
) -> PackedText:
    """Tokenize `pieces` into `folder`: tokens.bin, one document after the other, and meta.json.

    Each document gets the tokenizer's bos and eos, where it has them, once: a document that
    already begins or ends with them is unchanged.

    Raises:
        UserError: there is no text, or the tokenizer drops most of it.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    num_tokens = num_documents = num_bytes = num_unknown = largest = 0
    spelled: Counter[str] = Counter()
    starts, ends, unknown = tokenizer.starts, tokenizer.ends, tokenizer.unknown_id
    is_blank = True
    with (folder / "tokens.bin").open("wb") as stream:
        # A few pieces at a time keep the tokenizer's threads busy and its memory small.
        left = iter(pieces)
        while batch := list(islice(left, 8)):
            encoded = tokenizer.tokenizer.encode_batch_fast(
                [piece.text for piece in batch], add_special_tokens=False
            )
            for piece, encoding in zip(batch, encoded, strict=True):
                ids = encoding.ids
                if piece.starts and ids[:1] != starts:
                    ids = starts + ids
                if piece.ends and ids[-1:] != ends:
                    ids = ids + ends
                tokens = np.asarray(ids, dtype=dtype)
                # Not tofile: on a full disk it only reports a short write.
                stream.write(tokens.tobytes())
                num_tokens += len(ids)
                num_documents += piece.ends
                num_bytes += len(piece.text.encode("utf-8"))
                num_unknown += (
                    int(np.count_nonzero(tokens == unknown)) if unknown is not None else 0
                )
                largest = max(largest, int(tokens.max(initial=0)))
                for token in (*tokenizer.literal, *tokenizer.read):
                    spelled[token] += piece.text.count(token)
                is_blank = is_blank and not piece.text.strip()
            # An encoding takes about 100 bytes per character; two batches at once would double it.
            del batch, encoded, piece, encoding, ids, tokens
        stream.flush()
        os.fsync(stream.fileno())
    if is_blank or num_tokens == 0:
        raise UserError(f"{source} holds no text, or only white space")
    packed = PackedText(
        format=FORMAT,
        dtype=dtype.name,
        num_tokens=num_tokens,
        num_documents=num_documents,
        num_bytes=num_bytes,
        vocab_size=largest + 1,
        num_unknown=num_unknown,
        spelled={token: spelled[token] for token in tokenizer.literal if spelled[token]},
        read={token: spelled[token] for token in tokenizer.read if spelled[token]},
    )
    if num_bytes > MAX_BYTES_PER_TOKEN * num_tokens:
        raise UserError(
            f"{source}: {packed.describe()}: the tokenizer drops text; choose another with "
            "--model.tokenizer"
        )
    (folder / "meta.json").write_text(json.dumps(asdict(packed), indent=2) + "\n")
    return packed


class Rows(Protocol):
    """What a step trains on and an evaluation scores: rows of `sequence_length` tokens."""

    sequence_length: int

    @property
    def num_full(self) -> int:
        """Rows that training reads."""

    @property
    def num_all(self) -> int:
        """Rows that evaluation reads."""

    @property
    def positions_per_target(self) -> float:
        """Tokens that are computed for each that is a target."""

    def bytes_of(self, num_tokens: float) -> float:
        """Return the bytes, in UTF-8, that `num_tokens` targets stand for on average."""

    def rows(self, indices: list[int]) -> tuple[npt.NDArray[np.int64], ...]:
        """Return inputs, labels and perhaps positions, each of shape (len(indices), T)."""


class Blocks:
    """The blocks of a packed folder: block i is tokens [i T, i T + T + 1), T the sequence length.

    Neighbours share one token, so that every token but the first is a target exactly once.
    """

    def __init__(self, folder: Path, sequence_length: int) -> None:
        """Map the folder.

        Raises:
            UserError: it is not packed text, was cut short, or is shorter than one block.
        """
        try:
            self.packed = PackedText(**json.loads((folder / "meta.json").read_text()))
            with (folder / "tokens.bin").open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            # Rows are read in a random order: reading ahead would fetch megabytes for each.
            mapped.madvise(mmap.MADV_RANDOM)
            self._tokens = np.frombuffer(mapped, dtype=self.packed.dtype)
        except (OSError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder}: is not packed text ({error}); delete it, and it will be rebuilt"
            ) from None
        if len(self._tokens) != self.packed.num_tokens:
            raise UserError(
                f"{folder}: tokens.bin holds {len(self._tokens)} tokens but meta.json says "
                f"{self.packed.num_tokens}; delete the folder, and it will be rebuilt"
            )
        self.sequence_length = sequence_length
        self._num_targets = self.packed.num_tokens - 1

    @property
    def num_full(self) -> int:
        """Full blocks, which training reads; a tail of fewer than T tokens is dropped."""
        return self._num_targets // self.sequence_length

    @property
    def num_all(self) -> int:
        """All blocks, with the last one, which may be short; evaluation reads these."""
        return -(-self._num_targets // self.sequence_length)

    @property
    def positions_per_target(self) -> float:
        """1: every token of a full block has a target."""
        return 1.0

    def bytes_of(self, num_tokens: float) -> float:
        """Return the bytes that `num_tokens` targets stand for, as `Rows` says."""
        return self.packed.num_bytes * num_tokens / self._num_targets

    def rows(self, indices: list[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (inputs, labels), each of shape (len(indices), T).

        Labels are the inputs one token later; -100, which the loss ignores, fills a short last
        block and the whole row of an index past the end.
        """
        length = self.sequence_length
        inputs = np.zeros((len(indices), length), dtype=np.int64)
        labels = np.full((len(indices), length), -100, dtype=np.int64)
        for row, index in enumerate(indices):
            tokens = self._tokens[index * length : index * length + length + 1]
            count = max(0, len(tokens) - 1)
            inputs[row, :count] = tokens[:count]
            labels[row, :count] = tokens[1 : count + 1]
        return inputs, labels


def micro_batch_positions(
    position: int,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
) -> list[list[int]]:
    """Return the positions that a rank reads in the step that starts at `position`.

    One list per micro batch. Together the ranks read each position of the step once, however many
    ranks there are, so the trajectory stays the same.
    """
    firsts = [
        position + (micro * world_size + rank) * micro_batch_size
        for micro in range(gradient_accumulation_steps)
    ]
    return [list(range(first, first + micro_batch_size)) for first in firsts]


def block_at(position: int, *, num_blocks: int, seed: int) -> int:
    """Return the block that is read at `position` (0 is the run's first sequence).

    Each epoch is a permutation of all blocks, a different one each time.
    """
    epoch, offset = divmod(position, num_blocks)
    return permute(offset, size=num_blocks, key=_mix(_mix(seed) + epoch))


def permute(index: int, *, size: int, key: int) -> int:
    """Return where `index` goes in a pseudo-random permutation of range(`size`), in O(1) memory.

    A Feistel network over the next even number of bits, walked until the result falls inside the
    range (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 3). Eight rounds:
    with four, the first block of a corpus of five is not drawn evenly over the epochs.
    """
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & half_mask
        for turn in range(8):
            left, right = right, left ^ (_mix(key ^ (turn << 58) ^ right) & half_mask)
        index = left << half_bits | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """Return the finalizer of SplitMix64 (Steele, Lea & Flood 2014) of `value` mod 2**64."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
