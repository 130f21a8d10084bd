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
from train.engine.distributed import rank, truth, world_size
from train.engine.loss import TokenLoss
from train.engine.source import Source, read_buffers
from train.engine.strategy.base import Strategy


class Fsdp2(Strategy):
    """Training under fsdp2."""

    def build(self, loss: TokenLoss, source: Source | None) -> None:
        self.module = loss if source else loss.to(self.device)
        self.mesh = init_device_mesh(self.device.type, (world_size(),))
        offload = CPUOffloadPolicy() if truth("FSDP_OFFLOAD_PARAMS") else OffloadPolicy()
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        for layer in models.layers(loss.model):
            fully_shard(
                layer, mesh=self.mesh, reshard_after_forward=reshard, offload_policy=offload
            )
        fully_shard(loss, mesh=self.mesh, reshard_after_forward=reshard, offload_policy=offload)
        if source:
            self._fill(loss, source, torch.device("cpu") if truth("FSDP_OFFLOAD_PARAMS") else None)
        self.optimizer = self._adamw(loss)

    def _fill(self, loss: TokenLoss, source: Source, offload: torch.device | None) -> None:
        """Read this rank's part of each parameter: its rows, as torch.chunk would cut them."""
        place = offload or self.device

        def made(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_meta:
                return torch.empty_like(tensor, device=place)
            return tensor.to(self.device)

        loss._apply(made)
        read_buffers(loss.model, source)
        with torch.no_grad():
            for name, parameter in loss.model.named_parameters():
                local: Any = parameter.to_local()  # type: ignore[attr-defined]
                size = -(-parameter.shape[0] // world_size())
                start = min(rank() * size, parameter.shape[0])
                local.copy_(source.read(name, slice(start, start + local.shape[0])))

    def accumulate(
        self, batch: Sequence[torch.Tensor], *, scale: torch.Tensor, last: bool
    ) -> torch.Tensor:
        self.module.set_requires_gradient_sync(last)
        loss = self.scaled_loss(batch, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _like(self, parameter: Any, full: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(full.to(self.device), self.mesh, parameter.placements)
