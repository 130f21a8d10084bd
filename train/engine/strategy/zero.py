"""DeepSpeed's ZeRO, stages 1 to 3, with and without offload to host memory."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from runfolder.errors import UserError
from train.engine.checkpoint_reader import ReadState
from train.engine.loss import TokenLoss
from train.engine.memory import BUCKET
from train.engine.source import Source, place
from train.engine.strategy.base import STATES, Strategy


class Zero(Strategy):
    """A model under DeepSpeed's ZeRO: optimizer, gradients and weights split by stage."""

    def __init__(self, *arguments: Any, stage: int) -> None:
        self.stage = stage
        super().__init__(*arguments)

    def build(self, loss: TokenLoss, source: Source | None) -> None:
        deepspeed = _import_deepspeed(self.device)
        offload = {
            f"offload_{what}": {"device": "cpu", "pin_memory": self.device.type == "cuda"}
            for what in ("optimizer", "param")
            if _offload_device(what) == "cpu"
        }
        bucket = min(BUCKET, sum(p.numel() for p in loss.parameters()))
        config = {
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clipping": self.settings.max_grad_norm,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                **offload,
            },
            "torch_autocast": {
                "enabled": self.reduce_bf16,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": _with_matrices(loss),
            },
            # torch's own AdamW, the same as under ddp, so that the arithmetic is the same.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        if source:
            for module in place(loss.model, source, self.device):
                deepspeed.zero.Init(module=module, config_dict_or_path=config)
        engine, *_ = deepspeed.initialize(
            model=loss if source or "offload_param" in offload else loss.to(self.device),
            optimizer=self._adamw(loss),
            config=config,
        )
        assert engine.zero_optimization_stage() == self.stage
        self.module = engine
        self.optimizer = engine.optimizer.optimizer
        self._create_states()

    def _create_states(self) -> None:
        """Give every flat partition its optimizer states now, not after the first step.

        A resume can then fill them; and DeepSpeed, which links parameters to states when the
        first of several parameter groups has stepped, finds those of all groups.
        """
        zero = self.module.optimizer
        partitions = (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )
        for partition in partitions:
            zeros = {key: torch.zeros_like(partition) for key in STATES[1:]}
            self.optimizer.state[partition] = {"step": self._step_count(0, partition), **zeros}
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def accumulate(
        self, batch: Sequence[torch.Tensor], *, scale: torch.Tensor, last: bool
    ) -> torch.Tensor:
        loss = self.scaled_loss(batch, scale)
        # The loss is divided already by the tokens of the whole step.
        self.module.backward(loss, scale_wrt_gas=False)
        if not last:
            self.module.step()
        return loss.detach()

    def step(self) -> float:
        # DeepSpeed skips the update when the norm is not finite, and sets `overflow`.
        self.module.step()
        norm = float(self.module.get_global_grad_norm())
        return float("inf") if self.module.optimizer.overflow else norm

    def full(self, parameter: Any, state: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if state == "weight":
            if self.stage < 3:
                return parameter.detach()
            full = safe_get_full_fp32_param(parameter)
        else:
            full = safe_get_full_optimizer_state(parameter, state)
        shape = parameter.ds_shape if self.stage == 3 else parameter.shape
        return full.reshape(shape)

    def load_optimizer(self, steps: int, read: ReadState) -> None:
        """Fill the states of the flat partitions that DeepSpeed made of the parameters."""
        from deepspeed.utils import (
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        for partition, state in self.optimizer.state.items():
            state["step"] = self._step_count(steps, partition)
        for name, parameter in self.parameters():
            for key in STATES[1:]:
                full = read(name, key).to(self.device)
                if self.stage == 3:
                    local = self._local_part(full, parameter.ds_tensor.numel())
                    safe_set_local_optimizer_state(parameter, local, key)
                else:
                    safe_set_full_optimizer_state(parameter, full, key)

    @staticmethod
    def _local_part(full: torch.Tensor, length: int) -> torch.Tensor:
        """Return this rank's part of a tensor that ZeRO-3 cuts evenly, the last part padded."""
        start = dist.get_rank() * length
        part = full.flatten()[start : start + length]
        return nn.functional.pad(part, (0, length - part.numel()))


def _with_matrices(model: nn.Module) -> list[str]:
    """Return the classes of a model whose parameters travel in bf16; norms stay in fp32."""
    kinds = {
        type(module)
        for module in model.modules()
        if any(p.dim() > 1 for p in module.parameters(recurse=False))
    }
    return sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        # Otherwise DeepSpeed looks for a GPU, and compiles an op for shared memory with g++.
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed uses a deprecated name; the user cannot fix that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _offload_device(what: str) -> str:
    device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
    if device not in ("none", "cpu"):
        raise UserError(f"offload_{what}_device: {device} is not supported; use none or cpu")
    return device
