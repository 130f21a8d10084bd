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

# What transformers writes of a tokenizer, or reads to make one.
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
FORMAT = 2
# How a document begins and ends, and what in it is text; ours, and no part of an export.
FRAME = "frame.json"
# A tokenizer is trained on the head of the text, so that memory does not grow with the corpus.
TRAINING_CHARACTERS = 16 * 1024 * 1024


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with the ids that delimit documents; None where it has no such token."""

    tokenizer: Tokenizer
    """Reads text as text: it neither cuts nor pads it, and does not take what spells one of
    `literal` for that token."""
    bos_id: int | None
    """Begins a document, unless `eos_id` is the same: then that alone stands between two."""
    eos_id: int | None
    literal: tuple[str, ...] = ()
    """Special tokens that only we place: a text that spells one (`<s>` in HTML) holds no token."""
    read: tuple[str, ...] = ()
    """Ends of a document that a text may spell, as the chat template writes them."""
    special_ids: frozenset[int] = frozenset()
    """All special tokens, which a person is not shown."""
    unknown_id: int | None = None
    """Stands for what the vocabulary lacks; None where it lacks nothing, as bytes do."""

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
        """One more than the largest id that a document can hold: no padding, for one."""
        ids = self.tokenizer.get_vocab(with_added_tokens=True)
        return 1 + max(
            *self.starts,
            *self.ends,
            *(i for token, i in ids.items() if token not in self.literal),
            -1,
            -1,  # max takes no single number
        )

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids` without special tokens."""
        text: str = self.tokenizer.decode([i for i in ids if i not in self.special_ids])
        return text


def load(folder: Path, *, parse_special_tokens: bool = False) -> LoadedTokenizer:
    """Return the tokenizer of a folder that `place` or `train` filled.

    `parse_special_tokens` takes what a text spells for the tokens, all of them.

    Raises:
        UserError: the folder holds none that can be read.
    """
    path = folder / "tokenizer.json"
    try:
        form = json.loads(path.read_bytes())
        path = folder / FRAME
        frame = json.loads(path.read_bytes()) if path.exists() else _older_frame(folder, form)
        path = folder / "tokenizer.json"
        # As transformers saves them once a tokenizer was called with them: each text would be cut.
        form |= {"truncation": None, "padding": None}
        literal = [] if parse_special_tokens else frame["literal"]
        added = form.get("added_tokens") or ()
        special_ids = frozenset(token["id"] for token in added if token["special"])
        for token in added:
            # The library leaves special tokens out of a text, or takes them all.
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
    """Return the frame of a folder of before there was `FRAME`: a run goes on with its own."""
    tokens = _special_tokens(folder)
    vocabulary = form["model"].get("vocab")
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {token["content"]: token["id"] for token in form.get("added_tokens") or ()}
    bos, eos = (_content(tokens.get(key)) for key in ("bos_token", "eos_token"))
    return {"bos_id": ids.get(bos), "eos_id": ids.get(eos), "literal": []}


def _special_tokens(folder: Path) -> dict[str, Any]:
    """Return what the files of a tokenizer say of its special tokens, the newer file last."""
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said |= read_json(folder / name, "model.tokenizer") or {}
    return said


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def place(source: Path, folder: Path) -> None:
    """Put the tokenizer that transformers makes of `source` into `folder`, and its frame.

    Raises:
        UserError: as `check`, or transformers makes no fast tokenizer of it.
    """
    home = check(source)
    loaded = _as_transformers(home, source)
    copy(home, folder)
    form = json.loads(loaded.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    (folder / "tokenizer.json").write_text(json.dumps(form, ensure_ascii=False), encoding="utf-8")
    if not (folder / "tokenizer_config.json").exists():
        _write_config(folder, bos=loaded.bos_token, eos=loaded.eos_token)
    _write_frame(folder, _frame(home, loaded))
    load(folder)


def check(source: Path) -> Path:
    """Return the folder of a tokenizer's `source`: itself, or that of the file it is.

    Before torch is imported, as far as that goes.

    Raises:
        UserError: it is neither a folder that holds a tokenizer nor its tokenizer.json or
            tokenizer.model, or the file is damaged.
    """
    if not source.exists():
        raise UserError(f"model.tokenizer: {source} does not exist")
    if source.is_file() and source.name not in ("tokenizer.json", "tokenizer.model"):
        raise UserError(
            f"model.tokenizer: {source} is not named tokenizer.json or tokenizer.model; "
            "give one of these, or the folder that holds it"
        )
    home = source if source.is_dir() else source.parent
    if not any((home / name).exists() for name in FILES if not name.endswith("_config.json")):
        raise UserError(
            f"model.tokenizer: {home} holds neither tokenizer.json nor tokenizer.model; "
            "give a folder that does with --model.tokenizer"
        )
    _check_readable(home)
    return home


def _check_readable(home: Path) -> None:
    """Raise `UserError` for a file that its own library does not read: it says less than we can."""
    path, model = home / "tokenizer.json", home / "tokenizer.model"
    if path.exists():
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise UserError(f"model.tokenizer: {path} cannot be read: {error}") from None
    if path.exists() or not model.exists():
        return
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError):
        raise UserError(
            f"model.tokenizer: {model} is not a sentencepiece model; give its tokenizer.json"
        ) from None


def _as_transformers(home: Path, source: Path) -> Any:
    """Return what `AutoTokenizer` makes of a folder: its rules, not the file's, hold later on."""
    # Slow to import (it brings torch), and needed only here: once for each tokenizer.
    from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    described = any((home / name).exists() for name in ("tokenizer_config.json", "config.json"))
    try:
        if described:
            loaded = AutoTokenizer.from_pretrained(
                home, local_files_only=True, trust_remote_code=False
            )
        elif (home / "tokenizer.json").exists():
            loaded = PreTrainedTokenizerFast.from_pretrained(home)
        else:
            loaded = LlamaTokenizer.from_pretrained(home)
    except Exception as error:  # whatever the libraries below it raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"model.tokenizer: transformers makes no tokenizer of {source}: {lines[0]}"
        ) from None
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise UserError(
            f"model.tokenizer: {source} makes a {type(loaded).__name__}, which has no "
            "tokenizer.json; save it as a fast tokenizer first"
        )
    return loaded


def _frame(home: Path, loaded: Any) -> dict[str, Any]:
    """Return how documents of a tokenizer begin and end, and which special tokens we alone place.

    bos and eos are what tokenizer_config.json or special_tokens_map.json says, also if it says
    null; where they do not mention it, config.json's id; else what the tokenizer's class has.
    `add_bos_token: false` says that the model never saw a bos. A special token that the chat
    template writes is one wherever a text spells it, and so is the eos that it names.
    """
    said = _special_tokens(home)
    shape = read_json(home / "config.json", "model.tokenizer") or {}
    known = loaded.get_vocab().values()

    def one(name: str) -> int | None:
        if f"{name}_token" not in said:
            ids: Any = shape.get(f"{name}_token_id")
            first = ids[0] if isinstance(ids, list) and ids else ids
            if isinstance(first, int) and first in known:
                return first
        found: int | None = getattr(loaded, f"{name}_token_id")
        return found

    bos, eos = one("bos"), one("eos")
    others = (getattr(loaded, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask"))
    placed = {i for i in (bos, eos, *others) if i is not None}
    template = loaded.chat_template or ""
    template = template if isinstance(template, str) else "".join(template.values())
    # By its name, as many templates end a message; a beginning is placed, and no text spells it.
    written = {loaded.eos_token} if eos is not None and "eos_token" in template else set()
    return {
        "bos_id": None if said.get("add_bos_token") is False and bos != eos else bos,
        "eos_id": eos,
        # GPT-2 has one token for all: what ends a document is not unknown.
        "unknown_id": None if loaded.unk_token_id in (bos, eos) else loaded.unk_token_id,
        "literal": sorted(
            token
            for token in loaded.convert_ids_to_tokens(sorted(placed))
            if token not in written and token not in template
        ),
        "read": sorted(written),
    }


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
    _write_frame(folder, {"bos_id": 0, "eos_id": 1, "literal": ["</s>", "<s>"]})


def _write_config(folder: Path, *, bos: str | None, eos: str | None) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_frame(folder: Path, frame: dict[str, Any]) -> None:
    (folder / FRAME).write_text(json.dumps(frame, indent=2) + "\n")
