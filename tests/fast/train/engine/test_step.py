"""One optimizer step: its loss is the mean over all target tokens, not the mean of means."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

from train import tinyllama
from train.engine import models, strategy
from train.engine.batches import block_at
from train.engine.loss import TokenLoss
from train.engine.once import staged_path
from train.engine.settings import OptimizerSettings
from train.engine.step import take_step
from train.engine.strategy.base import Strategy

LENGTH = 16
# Targets of the four rows, two micro batches of two; a mean of means would be another number.
TARGETS = (16, 3, 1, 9)


class Ragged:
    """Rows of which each has its own number of targets, in the shape that packed blocks have."""

    num_full = len(TARGETS)

    def __init__(self) -> None:
        tokens = np.random.default_rng(7).integers(3, 500, (len(TARGETS), LENGTH + 1))
        self.inputs, self.labels = tokens[:, :-1], tokens[:, 1:].copy()
        for row, count in enumerate(TARGETS):
            self.labels[row, count:] = -100

    def rows(self, indices: list[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return self.inputs[indices], self.labels[indices]


def wrap(loss: TokenLoss, device: torch.device) -> Strategy:
    """Return a model under DDP, for the rows in two micro batches of two."""
    return strategy.prepare(
        loss,
        OptimizerSettings(lr=1e-3),
        name="ddp",
        device=device,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        resume=None,
    )


def test_each_target_token_counts_once_however_the_micro_batches_are_cut(
    config: tinyllama.Config, device: torch.device
) -> None:
    assert config.staged is not None
    loss = TokenLoss(
        models.build(config, staged_path(config.staged.tokenizer), seed=1), device, False
    )
    ragged: Any = Ragged()
    inputs, labels = (torch.from_numpy(part) for part in (ragged.inputs, ragged.labels))
    logits = loss.model(input_ids=inputs).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    expected.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in loss.model.parameters()])
    loss.zero_grad(set_to_none=True)

    wrapped = wrap(loss, device)
    done = take_step(wrapped, ragged, config, step=0, position=0, writing=False)
    assert done.tokens == sum(TARGETS)
    assert done.loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert done.grad_norm == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("left_in", ["training", "eval"])
def test_a_step_has_its_dropout_and_its_checkpointing_whatever_came_before(
    config: tinyllama.Config, device: torch.device, left_in: str
) -> None:
    assert config.staged is not None
    config = replace(config, model=replace(config.model, gradient_checkpointing=True))
    built = models.build(config, staged_path(config.staged.tokenizer), seed=1)
    built.config.attention_dropout = 0.5
    for layer in models.layers(built):
        layer.self_attn.attention_dropout = 0.5
    wrapped = wrap(TokenLoss(built, device, False), device)
    wrapped.module.train(left_in == "training")
    calls: list[bool] = []
    # Once forward, and once more in the backward pass where activations are not kept.
    models.layers(built)[0].mlp.register_forward_pre_hook(lambda m, _: calls.append(m.training))
    ragged: Any = Ragged()
    done = take_step(wrapped, ragged, config, step=0, position=0, writing=False)
    assert calls == [True] * 4
    rows = [
        [block_at(p, num_blocks=4, seed=config.seed) for p in part] for part in ((0, 1), (2, 3))
    ]
    fresh = models.build(config, staged_path(config.staged.tokenizer), seed=1).train()
    for layer in models.layers(fresh):
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed((config.seed * 1_000_003 * 65_537) % 2**63)
    total = sum(
        functional.cross_entropy(
            fresh(input_ids=inputs).logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=-100,
            reduction="sum",
        )
        for inputs, labels in (map(torch.from_numpy, ragged.rows(part)) for part in rows)
    )
    assert done.loss == pytest.approx(float(total) / sum(TARGETS), rel=1e-6)
