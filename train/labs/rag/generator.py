"""The model that generates an answer from a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from runfolder.errors import UserError

if TYPE_CHECKING:
    import torch


class Generator:
    """A causal language model and its tokenizer, from a folder."""

    prompt_tokens: int
    """The tokens that a prompt may have, so that there is room for the answer."""

    def __init__(self, folder: Path, *, max_new_tokens: int, device: torch.device) -> None:
        """Load them.

        Raises:
            UserError: the folder holds no such model, or its context is too short.
        """
        from transformers import AutoTokenizer

        from train.engine import models

        try:
            model: Any = models.from_folder(folder)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except UserError as error:
            raise UserError(str(error).replace("model.name", "generator.name", 1)) from None
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"generator.name: {folder} cannot be loaded: {reason}") from None
        self._model: Any = model.to(device)
        self._device, self._max_new_tokens = device, max_new_tokens
        context = int(getattr(self._model.config, "max_position_embeddings", None) or 2048)
        self.prompt_tokens = context - max_new_tokens
        if self.prompt_tokens < 1:
            raise UserError(
                f"--max_new_tokens: {max_new_tokens} leaves no room for a prompt in the "
                f"generator's context of {context} tokens"
            )

    def count(self, text: str) -> int:
        """Return the tokens that a prompt takes."""
        return len(self._encode(text))

    def answer(self, text: str) -> str:
        """Return the answer to a prompt."""
        import torch

        ids = torch.tensor([self._encode(text)], device=self._device)
        tokens = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            pad_token_id=self._tokenizer.eos_token_id,
        )
        answer_ids = tokens[0, ids.shape[1] :]
        written: str = self._tokenizer.decode(answer_ids, skip_special_tokens=True)
        # A model that was not trained to stop continues with the next question.
        return written.split("\nQuestion:")[0].strip()

    def _encode(self, text: str) -> list[int]:
        has_template = bool(self._tokenizer.chat_template)
        if has_template:
            # A chat model was trained with this around a message; it includes the special tokens.
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        ids: list[int] = self._tokenizer(text, add_special_tokens=not has_template)["input_ids"]
        return ids
