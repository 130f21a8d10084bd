"""How an encoder's token vectors become one: as its folder says, in sentence-transformers' files.

A folder without modules.json is pooled by the mean over its tokens, as sentence-transformers does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from train.engine import tokenization
from train.engine.modelfolder import read_json

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
# One for each model type that the library first supported.
KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
TRANSFORMERS = tuple(f"sentence_{kind}_config.json" for kind in KINDS)
FILES = (MODULES, PROMPTS, *TRANSFORMERS, "*_Pooling/config.json")
MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """What sentence-transformers would do around an encoder."""

    mode: str = "mean"
    """mean: over all tokens. cls: the first one's vector."""
    query_prompt: str = ""
    """Put before a query."""
    document_prompt: str = ""
    """Put before a document."""
    default_prompt: str = ""
    """Put before any other text."""
    max_length: int | None = None
    """Tokens of a text that are read; None: as many as there are positions."""


def check_plain(folder: Path | None) -> None:
    """Raise `UserError` if an encoder needs a prompt before every text, as none is added."""
    if prompt := read(folder).default_prompt:
        raise UserError(
            f"model.name: {folder} needs '{prompt}' before every text, which this lab does not "
            "add; put it into the texts and remove default_prompt_name from "
            f"{PROMPTS}, or choose another encoder"
        )


def check_compared(folder: Path | None) -> None:
    """Raise `UserError` if an encoder's vectors are not compared by cosine similarity."""
    if folder is None:
        return
    wanted = _object(folder / PROMPTS).get("similarity_fn_name") or "cosine"
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in _list(folder / MODULES)]
    if wanted != "cosine" and not (wanted == "dot" and "Normalize" in kinds):
        raise UserError(
            f"model.name: {folder / PROMPTS} asks for the similarity {wanted}; passages are "
            "compared by cosine, so choose another encoder"
        )


def prompt_tokens(folder: Path | None, tokenizer_folder: Path) -> int:
    """Return how many of the encoder's tokens the longer of the prompts takes."""
    found = read(folder)
    encode = tokenization.load(tokenizer_folder).tokenizer.encode
    prompts = (found.query_prompt, found.document_prompt)
    return max(len(encode(prompt, add_special_tokens=False).ids) for prompt in prompts)


def read(folder: Path | None) -> Pooling:
    """Return the pooling of an encoder's folder.

    Raises:
        UserError: it asks for something other than the mean or the first token.
    """
    if folder is None:
        return Pooling()
    prompts = _object(folder / PROMPTS)
    named: dict[str, str] = prompts.get("prompts") or {}
    default = named.get(prompts.get("default_prompt_name") or "", "")
    file = next((file for name in TRANSFORMERS if (file := folder / name).exists()), None)
    transformer = _object(file) if file else {}
    if transformer.get("do_lower_case"):
        raise UserError(
            f"model.name: {file} asks for do_lower_case, which is not supported; set it in the "
            "tokenizer, or choose another encoder"
        )
    return Pooling(
        mode=_mode(folder),
        # As encode_query and encode_document choose.
        query_prompt=named.get("query", default),
        document_prompt=next(
            (named[name] for name in ("document", "passage", "corpus") if name in named), default
        ),
        default_prompt=default,
        max_length=_max_length(folder, transformer),
    )


def _max_length(folder: Path, transformer: dict[str, Any]) -> int | None:
    if not (folder / MODULES).exists():
        return None
    # Newer folders have it in the tokenizer's file, where a huge number means no limit.
    found = transformer.get("max_seq_length")
    found = found or _object(folder / "tokenizer_config.json").get("model_max_length")
    return int(found) if found and found < 1e6 else None


def _mode(folder: Path) -> str:
    modules = _list(folder / MODULES)
    # Vectors are normalized where they are compared, with Normalize or without.
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    for module, kind in zip(modules, kinds, strict=True):
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise UserError(
                f"model.name: {folder / MODULES} asks for a module {kind} ({module.get('path')}), "
                "which is not supported; choose an encoder with only Transformer, Pooling and "
                "Normalize"
            )
    if modules and "Pooling" not in kinds:
        raise UserError(
            f"model.name: {folder / MODULES} has no Pooling module, so a text does not get a "
            "single vector; choose a sentence encoder"
        )
    if not modules:
        return "mean"
    path = folder / str(modules[kinds.index("Pooling")].get("path", "")) / "config.json"
    settings = _object(path)
    # Older files have a flag for each mode; newer ones a name, or several joined by +.
    chosen = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    if "pooling_mode" in settings:
        chosen = [f"pooling_mode_{settings['pooling_mode']}"]
    names = MODES | {"pooling_mode_mean": "mean", "pooling_mode_cls": "cls"}
    if len(chosen) != 1 or chosen[0] not in names or settings.get("include_prompt") is False:
        said = ", ".join(chosen) or "none"
        if settings.get("include_prompt") is False:
            said += " without the prompt (include_prompt: false)"
        raise UserError(
            f"model.name: {path} asks for {said}; use the mean over all tokens "
            "(pooling_mode_mean_tokens) or the first one (pooling_mode_cls_token)"
        )
    return names[chosen[0]]


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path, "model.name")
    return found if isinstance(found, dict) else {}


def _list(path: Path) -> list[dict[str, Any]]:
    found = read_json(path, "model.name")
    return found if isinstance(found, list) else []
