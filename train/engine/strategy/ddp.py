"""Every rank has the whole model; gradients are averaged (torch's DistributedDataParallel)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from train.engine.distributed import world_size
from train.engine.loss import TokenLoss
from train.engine.source import Source
from train.engine.strategy.base import Strategy


class Ddp(Strategy):
    """Training under ddp."""

    def build(self, loss: TokenLoss, source: Source | None) -> None:
        assert source is None
        self.module = loss.to(self.device)
        self.optimizer = self._adamw(loss)
        if world_size() > 1:
            self.module = nn.parallel.DistributedDataParallel(
                loss, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
            if self.reduce_bf16:
                # Under its own name, torch refuses it without a GPU; gloo knows bf16 as well.
                self.module.register_comm_hook(
                    None,
                    lambda state, bucket: bf16_compress_hook(state, bucket),  # noqa: PLW0108
                )

    def accumulate(
        self, batch: Sequence[torch.Tensor], *, scale: torch.Tensor, last: bool
    ) -> torch.Tensor:
        wait = last or world_size() == 1
        with contextlib.nullcontext() if wait else self.module.no_sync():
            loss = self.scaled_loss(batch, scale)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
