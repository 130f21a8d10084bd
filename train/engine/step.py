"""One optimizer step: read this rank's rows, forward and backward, divide once, clip, update.

Every language-model script takes the same step; what it does between two steps (score, log, save,
stop) is in the script's own loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from runfolder.moments import reached
from train.engine import guard, signals
from train.engine.batches import Rows, block_at, micro_batch_positions
from train.engine.config import TrainingConfig
from train.engine.distributed import agree, rank, world_size
from train.engine.loss import global_target_tokens
from train.engine.schedule import lr_at
from train.engine.strategy.base import Strategy


@dataclass(frozen=True, kw_only=True)
class Step:
    """The result of one step, the same on every rank except for the times."""

    loss: float
    """Mean over the target tokens of all ranks and micro batches, in nats, before the update."""
    lr: float
    grad_norm: float
    """Global norm before clipping."""
    tokens: float
    """Target tokens, over all ranks."""
    seconds: float
    data_seconds: float
    """The part of `seconds` in which this rank read its rows."""
    stop_asked: bool
    """Whether any rank has received a signal to stop."""
    any_writing: bool
    """Whether any rank was still writing a checkpoint."""


def take_step(
    wrapped: Strategy,
    training: Rows,
    config: TrainingConfig,
    *,
    step: int,
    position: int,
    writing: bool,
) -> Step:
    """Train on the `global_batch_size` sequences from `position` on; collective.

    `step` is the number of steps taken before; `writing`, whether this rank is still writing a
    checkpoint, is part of the same all-reduce as the loss.

    Raises:
        RunFailed: the loss or the gradient is not finite; the weights are unchanged.
    """
    started = time.perf_counter()
    device = wrapped.device
    # Only here, where a step needs it: a model is loaded from its folder in eval mode, and an
    # evaluation or a sample leaves it so. Dropout and gradient checkpointing depend on the mode.
    wrapped.module.train()
    # Dropout, if a model has any, depends only on seed, step and rank: nothing to save, and no two
    # of them share a value (a step below a million, a rank below 65,537).
    torch.manual_seed(((config.seed * 1_000_003 + step) * 65_537 + rank()) % 2**63)
    positions = micro_batch_positions(
        position,
        rank=rank(),
        world_size=world_size(),
        micro_batch_size=wrapped.micro_batch_size,
        gradient_accumulation_steps=wrapped.gradient_accumulation_steps,
    )
    batch = []
    for micro in positions:
        blocks = [block_at(p, num_blocks=training.num_full, seed=config.seed) for p in micro]
        batch.append([torch.from_numpy(part).to(device) for part in training.rows(blocks)])
    data_seconds = time.perf_counter() - started
    tokens = global_target_tokens((labels for _, labels, *_ in batch), device)
    # Gradients are averaged over ranks; this makes the average a sum over all tokens.
    scale = (world_size() / tokens).float()
    summed_loss = torch.zeros((), dtype=torch.float64, device=device)
    for number, micro_batch in enumerate(batch, start=1):
        last_micro = number == wrapped.gradient_accumulation_steps
        summed_loss += wrapped.accumulate(micro_batch, scale=scale, last=last_micro)
    # Without the scale's world size, the ranks' parts add up to the mean over all tokens.
    local_loss = float(summed_loss) / world_size()
    loss, stops, writers = agree(local_loss, signals.received() is not None, writing, device=device)
    guard.check_loss(local_loss, loss, step=step + 1, positions=positions)
    lr = lr_at(
        step, peak_lr=config.optimizer.lr, max_steps=config.max_steps, schedule=config.schedule
    )
    wrapped.set_lr(lr)
    grad_norm = wrapped.step()
    guard.check_gradient(grad_norm, step=step + 1, positions=positions)
    reached("after-step")
    return Step(
        loss=loss,
        lr=lr,
        grad_norm=grad_norm,
        tokens=float(tokens),
        seconds=time.perf_counter() - started,
        data_seconds=data_seconds,
        stop_asked=stops > 0,
        any_writing=writers > 0,
    )
