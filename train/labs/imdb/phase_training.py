"""The training of a phase: the head and the top blocks of a classifier, and one step of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from runfolder.moments import reached
from train.engine import guard, models, signals
from train.engine.batches import block_at, micro_batch_positions
from train.engine.distributed import agree, rank, world_size
from train.engine.schedule import lr_at
from train.engine.settings import BatchSettings, OptimizerSettings, ScheduleSettings
from train.engine.strategy.base import Strategy, assert_same_weights, assert_synchronised
from train.labs.imdb.transfer import STATISTICS, Classifier
from train.labs.imdb.unfreezing import Phase, UnfreezingSettings


class PhaseTraining(Strategy):
    """A classifier in a phase; frozen parameters are neither in the optimizer nor in a checkpoint.

    Each phase has its own optimizer: newly unfrozen parameters begin without moments, and so do
    the others. `module` is what runs: only the head, on vectors, or encoder and head, on tokens.
    """

    def __init__(
        self,
        model: Classifier,
        phase: Phase,
        optimizer: OptimizerSettings,
        unfreezing: UnfreezingSettings,
        *,
        device: torch.device,
        bf16: bool,
    ) -> None:
        """Freeze what does not train, create the optimizer, and wrap for several processes.

        `model` is in fp32 and the same on every rank.

        Raises:
            UserError: the ranks start from different weights.
        """
        self.model = model.to(device)
        self.model_config = model.encoder.config
        self.generation_config = None
        self.phase = phase
        self.settings = optimizer
        self.device = device
        self.bf16 = bf16
        blocks = model.blocks()[: phase.blocks]
        parts = [(unfreezing.head_lr, [model.head.weight, model.head.bias])]
        parts += [
            (optimizer.lr * unfreezing.block_decay**depth, block)
            for depth, block in enumerate(blocks)
        ]
        model.requires_grad_(False)
        groups: list[dict[str, Any]] = []
        for peak_lr, parameters in parts:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for decay, is_matrix in ((optimizer.weight_decay, True), (0.0, False)):
                chosen = [p for p in parameters if (p.ndim >= 2) == is_matrix]
                if chosen:
                    groups.append({"params": chosen, "peak_lr": peak_lr, "weight_decay": decay})
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=unfreezing.head_lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            fused=True,
        )
        assert_same_weights(model, device)
        self.module = model if phase.blocks else model.head
        if world_size() > 1:
            self.module = nn.parallel.DistributedDataParallel(
                self.module, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
        assert_synchronised(self.module)

    def counts(self) -> tuple[int, int]:
        """Return the number of parameters that train, and of all."""
        parameters = [p for name, p in self.model.named_parameters() if name not in STATISTICS]
        return sum(p.numel() for p in parameters if p.requires_grad), sum(
            p.numel() for p in parameters
        )

    def start_step(self, factor: float) -> None:
        """Set the learning rates to `factor` of their peaks, and dropout on where weights train."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        layers = models.layers(self.model.encoder)
        self.model.encoder.train(self.phase.blocks > len(layers))
        for layer in list(reversed(layers))[: self.phase.blocks]:
            layer.train()

    def learning_rates(self) -> dict[str, float]:
        """Return the rates of this step: `lr` of the head, `encoder_lr` of the top block."""
        groups = self.optimizer.param_groups
        rates = {"lr": groups[0]["lr"]}
        if self.phase.blocks:
            # The head makes two groups, its matrix and its bias.
            rates["encoder_lr"] = groups[2]["lr"]
        return rates

    def backward(
        self, inputs: tuple[torch.Tensor, ...], labels_B: torch.Tensor, *, scale: float, last: bool
    ) -> torch.Tensor:
        """Run a micro batch forward and backward; return its summed loss times `scale`.

        `last` ends the accumulation: gradients are averaged over the ranks with it.
        """
        wait = last or world_size() == 1
        with contextlib.nullcontext() if wait else self.module.no_sync():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                logits_BC = self.module(*inputs)
            loss = nn.functional.cross_entropy(logits_BC, labels_B, reduction="sum") * scale
            loss.backward()
        return loss.detach()

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield nothing: no encoder of this lab keeps state in buffers."""
        return iter(())

    def parameters(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and the value of each parameter in a checkpoint."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or name in STATISTICS:
                yield name, parameter


@dataclass(frozen=True, kw_only=True)
class PhaseStep:
    """The result of one optimizer step, the same on every rank except for `seconds`."""

    loss: float
    """Mean over the rows of the global batch, in nats, before the update."""
    grad_norm: float
    """Global norm before clipping."""
    seconds: float
    stop_asked: bool
    """Whether any rank has received a signal to stop."""
    any_writing: bool
    """Whether any rank was still writing a checkpoint."""


def take_step(
    training: PhaseTraining,
    inputs_of: Callable[[list[int]], tuple[torch.Tensor, ...]],
    labels: list[int],
    batch: BatchSettings,
    schedule: ScheduleSettings,
    *,
    step: int,
    seed: int,
    writing: bool,
) -> PhaseStep:
    """Train on the `global_batch_size` rows of step `step` (0 is the run's first); collective.

    Each epoch is a new permutation of the rows, so that a step's rows depend only on its number
    and the seed. They form the same micro batches, with the same dropout, on any number of
    processes with one `micro_batch_size`; the ranks split these among themselves. `inputs_of`
    gives the inputs of rows, `labels` the class of each.

    Raises:
        RunFailed: the loss or the gradient is not finite; the weights are unchanged.
    """
    started = time.perf_counter()
    micro_batch_size, gradient_accumulation_steps = batch.per_process(world_size())
    positions = micro_batch_positions(
        step * batch.global_batch_size,
        rank=rank(),
        world_size=world_size(),
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    # Each phase warms up and decays by itself.
    phase = training.phase
    factor = lr_at(step - phase.first_step, peak_lr=1.0, max_steps=phase.steps, schedule=schedule)
    training.start_step(factor)
    local_loss = 0.0
    for number, micro_positions in enumerate(positions, start=1):
        # Dropout depends on seed, step and position in the batch, whichever rank computes it.
        torch.manual_seed((seed * 1_000_000_007 + micro_positions[0] // micro_batch_size) % 2**63)
        rows = [block_at(p, num_blocks=len(labels), seed=seed) for p in micro_positions]
        loss = training.backward(
            inputs_of(rows),
            torch.tensor([labels[row] for row in rows], device=training.device),
            # Gradients are averaged over ranks; this makes it the mean over the global batch.
            scale=world_size() / batch.global_batch_size,
            last=number == gradient_accumulation_steps,
        )
        local_loss += float(loss) / world_size()
    global_loss, stops, writers = agree(
        local_loss, signals.received() is not None, writing, device=training.device
    )
    guard.check_loss(local_loss, global_loss, step=step + 1, positions=positions)
    grad_norm = training.step()
    guard.check_gradient(grad_norm, step=step + 1, positions=positions)
    reached("after-step")
    return PhaseStep(
        loss=global_loss,
        grad_norm=grad_norm,
        seconds=time.perf_counter() - started,
        stop_asked=stops > 0,
        any_writing=writers > 0,
    )
