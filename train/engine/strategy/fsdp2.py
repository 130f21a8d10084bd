"""Weights, gradients and optimizer are sharded layer by layer (torch's fully_shard)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from train.engine import models
from train.engine.distributed import truth, world_size
from train.engine.loss import TokenLoss
from train.engine.strategy.base import Strategy


class Fsdp2(Strategy):
    """Training under fsdp2."""

    def build(self, loss: TokenLoss) -> None:
        self.module = loss.to(self.device)
        self.mesh = init_device_mesh(self.device.type, (world_size(),))
        offload = CPUOffloadPolicy() if truth("FSDP_OFFLOAD_PARAMS") else OffloadPolicy()
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        for layer in models.layers(loss.model):
            fully_shard(
                layer, mesh=self.mesh, reshard_after_forward=reshard, offload_policy=offload
            )
        fully_shard(loss, mesh=self.mesh, reshard_after_forward=reshard, offload_policy=offload)
        self.optimizer = self._adamw(loss)

    def accumulate(
        self, batch: Sequence[torch.Tensor], *, scale: torch.Tensor, last: bool
    ) -> torch.Tensor:
        self.module.set_requires_gradient_sync(last)
        loss = self.scaled_loss(batch, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _like(self, parameter: Any, full: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(full.to(self.device), self.mesh, parameter.placements)
