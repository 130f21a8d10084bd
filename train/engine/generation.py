"""Text from a language model: the folder it is loaded from, and how its tokens are drawn."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from runfolder.errors import UserError
from train.engine import arguments
from train.engine.modelfolder import check_whole

Options = TypeVar("Options", bound="Sampling")
# The second is GPT-2's.
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")


@dataclass(kw_only=True)
class Sampling:
    """How the tokens of a text are drawn."""

    max_new_tokens: int = 64
    """The most tokens to write."""
    temperature: float = 0.8
    """Below 1 likely tokens become likelier; 0: always the most likely one."""
    top_p: float = 0.95
    """Draw only from the most likely tokens that together have this probability."""
    seed: int = 42
    """Of the random draws."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens} is not positive")
        if self.temperature < 0 or not math.isfinite(self.temperature):
            raise UserError(f"temperature: {self.temperature} must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not in (0, 1]")

    def options(self) -> dict[str, Any]:
        """Return them as transformers' `generate` takes them."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


def parse(options_class: type[Options], argv: list[str], module: str) -> tuple[Path, Options]:
    """Return the folder that a command line begins with, and the options after it.

    Raises:
        UserError: it begins with something else, or as `arguments.parse`.
    """
    if not argv or argv[0].startswith("-"):
        if {"--help", "-h"}.isdisjoint(argv):
            raise UserError(f"usage: python -m {module} FOLDER [OPTION ...]")
        argv = ["", *argv]
    prog = f"{module.replace('.', '/')}.py"
    return Path(argv[0]), arguments.parse(options_class, argv[1:], prog=prog, dry_run={})


def find_model(folder: Path) -> Path:
    """Return the model's folder: `folder` itself, or the export of the run `folder`.

    Raises:
        UserError: it holds no whole language model.
    """
    found = next((f for f in (folder, folder / "export") if _holds_a_model(f)), None)
    if found is None:
        raise UserError(
            f"{folder}: has no exported model; run `make export RUN=...` first, or give MODEL=, a "
            "Hugging Face model folder"
        )
    try:
        check_whole(found)
    except UserError as error:
        raise _without_setting(error) from None
    kinds = json.loads((found / "config.json").read_text(encoding="utf-8"))
    if not any(kind.endswith(LANGUAGE_MODELS) for kind in kinds.get("architectures") or ()):
        raise UserError(f"{found}: is not a language model and cannot generate text")
    return found


def _holds_a_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _without_setting(error: UserError) -> UserError:
    # It names the folder, which did not come from this setting here.
    return UserError(str(error).removeprefix("model.name: "))


class Writer:
    """A language model and its tokenizer, in fp32 on the GPU if there is one."""

    context: int | None
    """Tokens that the model can attend to; None: computed positions, without a limit."""
    end_ids: list[int]
    """Tokens that end a text."""

    def __init__(self, folder: Path, sampling: Sampling) -> None:
        """Load them from a folder of `find_model`, and seed the draws.

        Raises:
            UserError: they cannot be loaded.
        """
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import torch
        from transformers import AutoTokenizer

        from train.engine import models

        try:
            model: Any = models.from_folder(folder)
        except UserError as error:
            raise _without_setting(error) from None
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever its dependencies raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{folder}: its tokenizer cannot be loaded: {lines[0]}") from None
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._sampling = sampling
        self.context = getattr(model.config, "max_position_embeddings", None)
        ids = model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])}
        self.end_ids = sorted(ends - {None})
        torch.manual_seed(sampling.seed)

    def write(self, ids: list[int], streamer: Any = None) -> list[int]:
        """Return the tokens that follow `ids`, the end token included; not more than fit.

        A `streamer` (transformers') gets them one by one.

        Raises:
            UserError: the model lacks one of `ids`, which come from another model's tokenizer.
        """
        import torch

        known = self._model.get_input_embeddings().weight.shape[0]
        if max(ids) >= known:
            raise UserError(
                f"the tokenizer has a token {max(ids)}, and the model only {known} tokens; give "
                "the tokenizer that belongs to the model"
            )
        tokens = torch.tensor([ids], device=self._model.device)
        written = self._model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=self.room(ids),
            eos_token_id=self.end_ids or None,
            pad_token_id=self.end_ids[0] if self.end_ids else 0,
            num_beams=1,
            streamer=streamer,
            **self._sampling.options(),
        )
        return written[0, len(ids) :].tolist()

    def room(self, ids: list[int]) -> int:
        """Return how many tokens can follow `ids`: as many as asked for, or as the context has."""
        asked = self._sampling.max_new_tokens
        return asked if self.context is None else min(asked, self.context - len(ids))
