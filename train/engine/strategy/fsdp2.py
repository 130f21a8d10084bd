"""Weights, gradients and optimizer are sharded layer by layer (torch's fully_shard)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import distribute_tensor

from train.engine import models
from train.engine.distributed import rank, truth, world_size
from train.engine.loss import TokenLoss
from train.engine.source import Source, read_buffers
from train.engine.strategy.base import Strategy


class _ReduceInBf16(ReduceScatter):
    """Sums what was added up in fp32 over micro batches as DDP's bf16_compress_hook does."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        part = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        dist.reduce_scatter_single(part, input_tensor.to(torch.bfloat16), group=group, op=op)
        output_tensor.copy_(part)


class Fsdp2(Strategy):
    """Training under fsdp2."""

    def build(self, loss: TokenLoss, source: Source | None) -> None:
        self.module = loss if source else loss.to(self.device)
        self.mesh = init_device_mesh(self.device.type, (world_size(),))
        offload = CPUOffloadPolicy() if truth("FSDP_OFFLOAD_PARAMS") else OffloadPolicy()
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        whole = MixedPrecisionPolicy(cast_forward_inputs=False)
        # Weights are gathered in bf16, gradients added up in fp32. Only matrix products are
        # computed in bf16, as under the other strategies, where autocast does it.
        narrow = replace(whole, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policies = dict.fromkeys([*models.layers(loss.model), loss], narrow if loss.bf16 else whole)
        if loss.bf16:
            loss.model.get_input_embeddings().register_forward_hook(_in_fp32)
            if self.device.type == "cpu":
                # There, layer_norm takes no weights in bf16 for values in fp32.
                norms = [m for m in loss.modules() if isinstance(m, nn.LayerNorm)]
                policies = dict.fromkeys(norms, whole) | policies
        for module, policy in policies.items():
            fully_shard(
                module,
                mesh=self.mesh,
                reshard_after_forward=reshard,
                offload_policy=offload,
                mp_policy=policy,
            )
            if self.reduce_bf16:
                module.set_custom_reduce_scatter(_ReduceInBf16())
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


def _in_fp32(_module: Any, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
    return embedded.float()
