"""Text that a model in training generates, from the same prompts each time.

transformers' own `generate` calls the bare model, which under ZeRO-3 and FSDP2 is sharded over the
processes. Here all processes together call the model, as in training.

Imports torch only to sample: settings are checked before that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runfolder.errors import UserError
from train.engine.tokenization import LoadedTokenizer

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class SampleSettings:
    """The prompts that the model continues, before and after the training."""

    prompts: tuple[str, ...] | str = ("The history of the", "It was built in")
    """One prompt, or a list of prompts."""
    max_new_tokens: int = 40
    """Tokens to generate for each."""
    temperature: float = 0.0
    """0: always the most likely token. Above: sampled; higher is more random. Seeded by `seed`."""

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            self.prompts = (self.prompts,)
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise UserError('sample.prompts: one is empty; give a prompt, such as "The history"')
        if self.max_new_tokens < 1:
            raise UserError(f"sample.max_new_tokens: {self.max_new_tokens} is not positive")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"sample.temperature: {self.temperature} is not 0 or a positive number")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts as tokens, and how to read what follows them."""

    tokens: list[list[int]]
    end_ids: frozenset[int]
    """A text ends with any of these."""
    tokenizer: LoadedTokenizer
    answers_only: bool = False
    """The texts are without their prompts."""


def documents(settings: SampleSettings, tokenizer: LoadedTokenizer) -> Prompts:
    """Return the prompts, each as the start of a document."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    encode = tokenizer.tokenizer.encode
    return Prompts(
        tokens=[
            start + encode(prompt, add_special_tokens=False).ids for prompt in settings.prompts
        ],
        end_ids=frozenset(tokenizer.ends),
        tokenizer=tokenizer,
    )


def check_fits(settings: SampleSettings, prompts: Prompts, num_positions: int) -> None:
    """Raise `UserError` if a prompt and its continuation are longer than the model's context."""
    for prompt, tokens in zip(settings.prompts, prompts.tokens, strict=True):
        if len(tokens) + settings.max_new_tokens > num_positions:
            raise UserError(
                f"sample.max_new_tokens: {settings.max_new_tokens} and the {len(tokens)} tokens of "
                f"'{prompt[:40]}' are more than the {num_positions} positions of the model"
            )


def continue_prompts(
    module: Any,
    prompts: Prompts,
    settings: SampleSettings,
    *,
    seed: int,
    device: torch.device,
) -> list[str] | None:
    """Return the text of the model (a `TokenLoss`) for each prompt, or None if asked to stop.

    Collective; every rank returns the same. Leaves the model in eval mode.
    """
    import torch
    import torch.distributed as dist

    from train.engine import signals
    from train.engine.distributed import agree

    rows = prompts.tokens
    ends = [len(row) for row in rows]
    # The same shape from the first token to the last, so that compiled layers are compiled once.
    # Causal attention does not see the padding after a row's end.
    width = max(ends) + settings.max_new_tokens
    tokens = torch.zeros((len(rows), width), dtype=torch.int64, device=device)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    unfinished = set(range(len(rows)))
    generator = torch.Generator().manual_seed(seed)
    module.eval()
    with torch.no_grad():
        for _ in range(settings.max_new_tokens):
            if agree(signals.received() is not None, device=device)[0]:
                return None
            logits = module(tokens)[range(len(rows)), [end - 1 for end in ends]].float().cpu()
            if settings.temperature > 0:
                weights = torch.softmax(logits / settings.temperature, dim=-1)
                chosen = torch.multinomial(weights, 1, generator=generator)[:, 0]
            else:
                chosen = logits.argmax(dim=-1)
            chosen = chosen.to(device)
            # One rank chooses for all: a different last bit must not make the ranks diverge.
            dist.broadcast(chosen, src=0)
            for row in sorted(unfinished):
                tokens[row, ends[row]] = chosen[row]
                ends[row] += 1
                if int(chosen[row]) in prompts.end_ids:
                    unfinished.remove(row)
            if not unfinished:
                break
    starts = [len(ids) if prompts.answers_only else 0 for ids in rows]
    return [
        prompts.tokenizer.decode(tokens[row, start:end].tolist())
        for row, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
