"""A small model that talks: its folder, and answers that are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tests.models import write_tied_model
from train.engine.generation import Writer

CONTEXT = 96
BOS, EOS, END_OF_TURN = 0, 1, 11
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if 'forbidden' in m.content %}{{ raise_exception('No such word') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def write(folder: Path, template: str = TEMPLATE) -> Path:
    """Write a model of `CONTEXT` positions whose tokenizer begins every text with a BOS."""
    write_tied_model(
        folder,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    # As the field's chat models: an end that the tokenizer does not know, and draws of their own.
    settings = {"eos_token_id": [END_OF_TURN], "do_sample": True, "temperature": 0.6, "top_k": 9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    return folder


class Spoken:
    """Makes the model of a writer say tokens one after the other, and notes what it is fed."""

    def __init__(self, writer: Writer) -> None:
        self.fed: list[list[int]] = []
        """The tokens of each whole prompt."""
        self._coming: list[int] = []
        writer._model.register_forward_pre_hook(self._note, with_kwargs=True)
        writer._model.get_output_embeddings().register_forward_hook(self._choose)

    def say(self, tokens: Iterable[int]) -> None:
        """Have these come next."""
        self._coming = list(tokens)

    def _note(self, module: Any, words: Any, options: dict[str, Any]) -> None:
        ids = options["input_ids"]
        if ids.shape[1] > 1:
            self.fed.append(ids[0].tolist())

    def _choose(self, module: Any, words: Any, logits: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(logits, -1e4)
        chosen[..., self._coming.pop(0)] = 1e4
        return chosen
