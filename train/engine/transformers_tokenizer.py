"""A pretrained tokenizer, as transformers loads it, staged with the frame that we need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from runfolder.errors import UserError
from train.engine.modelfolder import read_json
from train.engine.tokenization import FILES, copy, load, special_tokens, write_config, write_frame


def place(source: Path, folder: Path) -> None:
    """Write the tokenizer that transformers loads from `source` to `folder`, and its frame.

    Raises:
        UserError: as `check`, or transformers has no fast tokenizer for it.
    """
    home = check(source)
    loaded = _as_transformers(home, source)
    copy(home, folder)
    form = json.loads(loaded.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    (folder / "tokenizer.json").write_text(json.dumps(form, ensure_ascii=False), encoding="utf-8")
    if not (folder / "tokenizer_config.json").exists():
        write_config(folder, bos=loaded.bos_token, eos=loaded.eos_token)
    write_frame(folder, _frame(home, loaded))
    load(folder)


def check(source: Path) -> Path:
    """Return the folder of a tokenizer's `source`: the folder itself, or the one with the file.

    What can be checked before torch is imported is checked here.

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
    """Raise `UserError` for a file that its own library cannot read: its errors say less."""
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
    """Return what `AutoTokenizer` loads from a folder: its rules, not the file's, apply later."""
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
    except Exception as error:  # whatever its dependencies raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"model.tokenizer: transformers cannot load a tokenizer from {source}: {lines[0]}"
        ) from None
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise UserError(
            f"model.tokenizer: {source} loads as a {type(loaded).__name__}, which has no "
            "tokenizer.json; save it as a fast tokenizer first"
        )
    return loaded


def _frame(home: Path, loaded: Any) -> dict[str, Any]:
    """Return how documents of a tokenizer begin and end, and which special tokens only we insert.

    bos and eos are what tokenizer_config.json or special_tokens_map.json says, even if it says
    null; if neither mentions them, config.json's ids; else those of the tokenizer's class.
    `add_bos_token: false` means that the model never saw a bos. A special token that the chat
    template writes is a token wherever a text spells it, and so is the eos that it names.
    """
    said = special_tokens(home)
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
    # By its name, as many templates end a message; a bos is inserted, and no text spells it.
    written = {loaded.eos_token} if eos is not None and "eos_token" in template else set()
    return {
        "bos_id": None if said.get("add_bos_token") is False and bos != eos else bos,
        "eos_id": eos,
        # GPT-2 has one token for everything: the end of a document is not an unknown token.
        "unknown_id": None if loaded.unk_token_id in (bos, eos) else loaded.unk_token_id,
        "literal": sorted(
            token
            for token in loaded.convert_ids_to_tokens(sorted(placed))
            if token not in written and token not in template
        ),
        "read": sorted(written),
        # Some of them only the tokenizer's class knows, and a chat template may ask for any.
        "named": {k: v for k, v in loaded.special_tokens_map.items() if isinstance(v, str)},
    }
