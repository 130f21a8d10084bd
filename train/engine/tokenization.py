"""Tokenizers as folders of files, handled without torch: copied, converted, or trained here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from runfolder.errors import UserError
from train.engine.data import Piece
from train.engine.modelfolder import read_json

# The tokenizer files that transformers writes or reads.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
FORMAT = 3
# How a document begins and ends, and what in it is text; our own file, not exported.
FRAME = "frame.json"
# A tokenizer is trained on the head of the text, so that memory does not grow with the corpus.
TRAINING_CHARACTERS = 16 * 1024 * 1024


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with the ids that delimit documents; None where it has no such token."""

    tokenizer: Tokenizer
    """Reads text as text: it neither truncates nor pads, and does not turn what spells one of
    `literal` into that token."""
    bos_id: int | None
    """Begins a document, unless `eos_id` is the same: then a single token separates two."""
    eos_id: int | None
    literal: tuple[str, ...] = ()
    """Special tokens that only we insert: a text that spells one (`<s>` in HTML) is just text."""
    read: tuple[str, ...] = ()
    """Ends of a document that a text may spell, as the chat template writes them."""
    special_ids: frozenset[int] = frozenset()
    """All special tokens; `decode` leaves them out."""
    unknown_id: int | None = None
    """Stands for what the vocabulary lacks; None if it lacks nothing, as with bytes."""

    @property
    def starts(self) -> list[int]:
        """The ids that a document begins with."""
        return [] if self.bos_id is None or self.bos_id == self.eos_id else [self.bos_id]

    @property
    def ends(self) -> list[int]:
        """The ids that a document ends with."""
        return [] if self.eos_id is None else [self.eos_id]

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included; some vocabularies have gaps."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def text_vocab_size(self) -> int:
        """One more than the largest id that a document can contain: no padding, for example."""
        ids = self.tokenizer.get_vocab(with_added_tokens=True)
        return 1 + max(
            *self.starts,
            *self.ends,
            *(i for token, i in ids.items() if token not in self.literal),
            -1,
            -1,  # max does not take a single number
        )

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids` without special tokens."""
        text: str = self.tokenizer.decode([i for i in ids if i not in self.special_ids])
        return text


def load(folder: Path, *, parse_special_tokens: bool = False) -> LoadedTokenizer:
    """Return the tokenizer of a folder that `place` or `train` filled.

    With `parse_special_tokens`, every special token that a text spells becomes that token.

    Raises:
        UserError: the folder holds none that can be read.
    """
    path = folder / "tokenizer.json"
    try:
        form = json.loads(path.read_bytes())
        path = folder / FRAME
        frame = json.loads(path.read_bytes()) if path.exists() else _older_frame(folder, form)
        path = folder / "tokenizer.json"
        # transformers saves the ones of its last call: each text would be truncated.
        form |= {"truncation": None, "padding": None}
        literal = [] if parse_special_tokens else frame["literal"]
        added = form.get("added_tokens") or ()
        special_ids = frozenset(token["id"] for token in added if token["special"])
        for token in added:
            # The library ignores all special tokens in a text, or recognizes all of them.
            token["special"] = token["content"] in literal
        tokenizer = Tokenizer.from_str(json.dumps(form))
        tokenizer.encode_special_tokens = True
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"model.tokenizer: {path} cannot be read: {error}") from None
    return LoadedTokenizer(
        tokenizer,
        frame["bos_id"],
        frame["eos_id"],
        tuple(literal),
        tuple(frame.get("read", ())),
        special_ids,
        frame.get("unknown_id"),
    )


def _older_frame(folder: Path, form: dict[str, Any]) -> dict[str, Any]:
    """Return the frame of a folder older than `FRAME`: a run continues with its own."""
    tokens = special_tokens(folder)
    vocabulary = form["model"].get("vocab")
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {token["content"]: token["id"] for token in form.get("added_tokens") or ()}
    bos, eos = (_content(tokens.get(key)) for key in ("bos_token", "eos_token"))
    return {"bos_id": ids.get(bos), "eos_id": ids.get(eos), "literal": []}


def special_tokens(folder: Path) -> dict[str, Any]:
    """Return what the files of a tokenizer say about its special tokens, the newer file last."""
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said |= read_json(folder / name, "model.tokenizer") or {}
    return said


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def copy(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, those that exist, into another folder."""
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def train(text: Iterable[Piece], vocab_size: int, folder: Path, source: str) -> None:
    """Train a byte-level BPE tokenizer of at most `vocab_size` on the head of `text`.

    Raises:
        UserError: there is no text.
    """
    is_blank = True

    def head() -> Iterator[str]:
        nonlocal is_blank
        left = TRAINING_CHARACTERS
        for piece in text:
            is_blank = is_blank and not piece.text.strip()
            yield piece.text[:left]
            left -= len(piece.text)
            if left <= 0:
                return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(head(), trainer)
    if is_blank:
        raise UserError(f"{source} holds no text, or only white space")
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, bos="<s>", eos="</s>")
    write_frame(folder, {"bos_id": 0, "eos_id": 1, "literal": ["</s>", "<s>"]})


def write_config(folder: Path, *, bos: str | None, eos: str | None) -> None:
    """Write the tokenizer_config.json that transformers needs beside a tokenizer.json."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_frame(folder: Path, frame: dict[str, Any]) -> None:
    """Write how documents begin and end, and what in them is text."""
    (folder / FRAME).write_text(json.dumps(frame, indent=2) + "\n")
