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

from train.engine.data import Piece
from train.engine.errors import UserError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)
# A tokenizer is trained on the head of the text, so that memory does not grow with the corpus.
TRAINING_CHARACTERS = 16 * 1024 * 1024


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with the ids that delimit documents; None where it has no such token."""

    tokenizer: Tokenizer
    bos_id: int | None
    eos_id: int | None

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included; some vocabularies have gaps."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def load(folder: Path) -> LoadedTokenizer:
    """Return the tokenizer of a folder.

    Raises:
        UserError: the folder holds none that can be read.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokens: dict[str, Any] = {}
        # Older folders name their special tokens in the first of these only.
        for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
            if path.exists():
                tokens |= json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"model.tokenizer: {path} cannot be read: {error}") from None

    def token_id(key: str) -> int | None:
        token = tokens.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        found: int | None = tokenizer.token_to_id(content) if content else None
        return found

    return LoadedTokenizer(tokenizer, token_id("bos_token"), token_id("eos_token"))


def place(source: Path, folder: Path) -> None:
    """Put the tokenizer of `source` (a folder, tokenizer.json or tokenizer.model) into `folder`.

    Raises:
        UserError: `source` is none of these.
    """
    if source.is_file() and source.name not in ("tokenizer.json", "tokenizer.model"):
        raise UserError(
            f"model.tokenizer: {source} is not named tokenizer.json or tokenizer.model; "
            "give one of these, or the folder that holds it"
        )
    home = source if source.is_dir() else source.parent
    if source.name == "tokenizer.model" or not (home / "tokenizer.json").exists():
        _convert_sentencepiece(source if source.is_file() else home / "tokenizer.model", folder)
        return
    copy(home, folder)
    if not (folder / "tokenizer_config.json").exists():
        _write_config(folder, bos=None, eos=None)
    load(folder)


def copy(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, as far as they are there, into another folder."""
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
    _write_config(folder, bos="<s>", eos="</s>")


def _convert_sentencepiece(model: Path, folder: Path) -> None:
    if not model.exists():
        raise UserError(
            f"model.tokenizer: {model.parent} holds neither tokenizer.json nor tokenizer.model; "
            "give a folder that does with --model.tokenizer"
        )
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError):
        raise UserError(
            f"model.tokenizer: {model} is not a sentencepiece model; give its tokenizer.json"
        ) from None
    # Slow to import (it brings torch), and needed only here: once for each tokenizer.model.
    from transformers import LlamaTokenizer

    lone = folder / "source"
    lone.mkdir()
    shutil.copyfile(model, lone / "tokenizer.model")
    LlamaTokenizer.from_pretrained(lone).save_pretrained(folder)
    shutil.rmtree(lone)


def _write_config(folder: Path, *, bos: str | None, eos: str | None) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
