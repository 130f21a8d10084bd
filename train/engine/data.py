"""Text from local files and the embedded sample; hub.py reads the datasets.

Text is streamed in pieces, so that memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from train.engine import characters
from train.engine.filenames import suffix_of
from train.engine.rows import as_text, read_rows

SAMPLES = Path(__file__).parent.parent / "samples"
PIECE_CHARACTERS = 64 * 1024


@dataclass(frozen=True)
class Piece:
    """A stretch of a document, and whether the document starts or ends with it."""

    text: str
    starts: bool
    ends: bool


def pieces(files: Iterable[Path], *, text_column: str, join_rows: bool) -> Iterator[Piece]:
    """Yield the text of local files.

    A txt file is one document; so is a row of the other files, unless `join_rows` makes the rows of
    a file the lines of one document.

    Raises:
        UserError: a file does not match its suffix, or lacks the column; with its line.
    """
    for file in files:
        if suffix_of(file) == ".txt":
            yield from running_text(characters.read(file))
        else:
            rows = read_rows(file, {"text_column": text_column})
            texts = (as_text(text, where, text_column) for where, (text,) in rows)
            yield from from_rows(texts, join_rows=join_rows)


def from_rows(rows: Iterable[str], *, join_rows: bool) -> Iterator[Piece]:
    """Yield rows as separate documents, or as the lines of one document."""
    if join_rows:
        yield from running_text(row if row.endswith("\n") else row + "\n" for row in rows)
        return
    for row in rows:
        if row.strip():
            # A long row is split too: a book on one line would take gigabytes to tokenize.
            size = PIECE_CHARACTERS
            yield from running_text(row[i : i + size] for i in range(0, len(row), size))


def running_text(stretches: Iterable[str]) -> Iterator[Piece]:
    """Yield one document in pieces of about 64 Ki characters, cut at line ends.

    A cut costs at most one token: some tokenizers put a space before the first word of a piece.
    """
    held, starts = "", True
    for stretch in stretches:
        held += stretch
        while len(held) >= PIECE_CHARACTERS:
            cut = held.rfind("\n", 0, PIECE_CHARACTERS) + 1
            cut = cut or held.rfind(" ", 0, PIECE_CHARACTERS) or PIECE_CHARACTERS
            cut = cut if cut > 0 else PIECE_CHARACTERS
            yield Piece(held[:cut], starts=starts, ends=False)
            held, starts = held[cut:], False
    if held or not starts:
        yield Piece(held, starts=starts, ends=True)
