"""What differs between ddp, zero1..3 and fsdp2; the only module that knows their names.

`accelerate launch` reads one file of configs/accelerate and tells each process of it through the
environment; here the model is wrapped accordingly. The wrapping is done by torch and DeepSpeed
themselves and then checked, because a launcher's or a library's guess about the hardware has
been seen to leave a model unwrapped, and unsynchronised copies train with plausible losses.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from train.engine.distributed import world_size
from train.engine.errors import UserError
from train.engine.loss import TokenLoss
from train.engine.settings import OptimizerSettings

# The tensors of a parameter that make a checkpoint, always of the full shape and in fp32.
STATES = ("weight", "exp_avg", "exp_avg_sq")
# Returns one state of one parameter from a checkpoint: (name, state) -> full tensor.
ReadState = Callable[[str, str], torch.Tensor]


def name_from_environment() -> str:
    """Return the strategy that the launcher's file asked for: ddp, zero1, zero2, zero3 or fsdp2."""
    if _truth("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        if stage not in ("1", "2", "3"):
            raise UserError(f"ZeRO stage {stage or 'none'} is not one of 1, 2, 3 (zero_stage)")
        return f"zero{stage}"
    if _truth("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION") != "2":
            raise UserError("FSDP version 1 is not supported; set fsdp_version: 2")
        return "fsdp2"
    return "ddp"


def bf16_from_environment() -> bool:
    """Return whether the launcher's file says mixed_precision: bf16.

    Raises:
        UserError: it asks for fp16 or fp8, which want loss scaling or other hardware.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision: {precision} is not supported; use bf16 or no")
    return precision == "bf16"


def prepare(
    loss: TokenLoss,
    settings: OptimizerSettings,
    *,
    name: str,
    device: torch.device,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    resume: tuple[int, ReadState] | None,
) -> Strategy:
    """Wrap a model (fp32, on the CPU, the same on every rank) for training.

    `resume` gives the optimizer steps done and the reader of the optimizer's states; the weights
    are in the model already.

    Raises:
        UserError: the ranks start from different weights.
    """
    assert_same_weights(loss, device)
    arguments = (loss, settings, device, micro_batch_size, gradient_accumulation_steps)
    strategy: Strategy
    if name.startswith("zero"):
        strategy = _Zero(*arguments, stage=int(name[-1]))
    elif name == "fsdp2":
        strategy = _Fsdp2(*arguments)
    else:
        strategy = _Ddp(*arguments)
    assert_synchronised(strategy.module)
    if resume is not None:
        strategy.load_optimizer(*resume)
    return strategy


def assert_same_weights(module: nn.Module, device: torch.device) -> None:
    """Raise `UserError` if the ranks hold different weights."""
    sums = torch.stack([p.detach().double().sum() for p in module.parameters()]).to(device)
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise UserError(
            "the processes start from different weights; they need the same seed and model folder"
        )


def assert_synchronised(module: nn.Module) -> None:
    """Raise `UserError` if several processes hold a model that nothing synchronises.

    For a model that another library wrapped too: accelerate given gloo for plain DDP returns the
    bare model and says nothing.
    """
    if world_size() == 1:
        return
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if kinds.isdisjoint({"DistributedDataParallel", "DeepSpeedEngine", "FSDPModule"}):
        raise UserError(
            f"{world_size()} processes, but the model is a bare {type(module).__name__}: gradients "
            "would not be synchronised; launch with a file of configs/accelerate"
        )


class Strategy:
    """A model under training: the loop's view of what was wrapped."""

    module: nn.Module
    optimizer: Any

    def __init__(
        self,
        loss: TokenLoss,
        settings: OptimizerSettings,
        device: torch.device,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
    ) -> None:
        self.settings = settings
        self.device = device
        self.micro_batch_size = micro_batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.build(loss)

    def build(self, loss: TokenLoss) -> None:
        """Wrap the model and make the optimizer."""
        raise NotImplementedError

    def accumulate(self, scaled_loss: Callable[[], torch.Tensor], *, last: bool) -> torch.Tensor:
        """Run one micro batch forward and backward; `last` ends the step's accumulation."""
        raise NotImplementedError

    def step(self) -> float:
        """Clip, step the optimizer, clear the gradients; return the gradient norm before clipping.

        With a norm that is not finite the weights and the optimizer are left as they were.
        """
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.max_grad_norm)
        total = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if total - total == 0:  # neither inf nor NaN
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the name (as in the exported model) and the parameter, tied ones once."""
        for name, parameter in self.module.named_parameters():
            yield name.rpartition("module.")[2].removeprefix("model."), parameter

    def full(self, parameter: nn.Parameter, state: str) -> torch.Tensor:
        """Return one state of a parameter, gathered to its full shape; collective."""
        tensor = parameter.detach() if state == "weight" else self.optimizer.state[parameter][state]
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def load_optimizer(self, steps: int, read: ReadState) -> None:
        """Put the optimizer into the state of a checkpoint after `steps` steps."""
        for name, parameter in self.parameters():
            state = self.optimizer.state[parameter]
            state["step"] = self._step_count(steps)
            for key in STATES[1:]:
                state[key] = self._like(parameter, read(name, key))

    def _like(self, parameter: nn.Parameter, full: torch.Tensor) -> torch.Tensor:
        return full.to(self.device)

    def _step_count(self, steps: int) -> torch.Tensor:
        # The fused optimizer keeps its count on the device, the plain one on the CPU.
        fused = self.optimizer.defaults.get("fused")
        return torch.tensor(float(steps), device=self.device if fused else "cpu")

    def _adamw(self, module: nn.Module) -> torch.optim.AdamW:
        parameters = list(module.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups,
            lr=self.settings.lr,
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.eps,
            weight_decay=self.settings.weight_decay,
            fused=self.device.type == "cuda",
        )


class _Ddp(Strategy):
    def build(self, loss: TokenLoss) -> None:
        self.module = loss.to(self.device)
        self.optimizer = self._adamw(loss)
        if world_size() > 1:
            self.module = nn.parallel.DistributedDataParallel(
                loss, forward_sync_buffers=False, gradient_as_bucket_view=True
            )

    def accumulate(self, scaled_loss: Callable[[], torch.Tensor], *, last: bool) -> torch.Tensor:
        wait = last or world_size() == 1
        with contextlib.nullcontext() if wait else self.module.no_sync():
            loss = scaled_loss()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class _Fsdp2(Strategy):
    def build(self, loss: TokenLoss) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        self.module = loss.to(self.device)
        self.mesh = init_device_mesh(self.device.type, (world_size(),))
        offload = CPUOffloadPolicy() if _truth("FSDP_OFFLOAD_PARAMS") else OffloadPolicy()
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        for layer in loss.model.get_decoder().layers:
            fully_shard(
                layer, mesh=self.mesh, reshard_after_forward=reshard, offload_policy=offload
            )
        fully_shard(loss, mesh=self.mesh, reshard_after_forward=reshard, offload_policy=offload)
        self.optimizer = self._adamw(loss)

    def accumulate(self, scaled_loss: Callable[[], torch.Tensor], *, last: bool) -> torch.Tensor:
        self.module.set_requires_gradient_sync(last)
        loss = scaled_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _like(self, parameter: nn.Parameter, full: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(full.to(self.device), self.mesh, parameter.placements)


class _Zero(Strategy):
    def __init__(self, *arguments: Any, stage: int) -> None:
        self.stage = stage
        super().__init__(*arguments)

    def build(self, loss: TokenLoss) -> None:
        deepspeed = _import_deepspeed(self.device)
        offload = {
            f"offload_{what}": {"device": "cpu", "pin_memory": self.device.type == "cuda"}
            for what in ("optimizer", "param")
            if _offload_device(what) == "cpu"
        }
        config = {
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clipping": self.settings.max_grad_norm,
            "zero_optimization": {"stage": self.stage, **offload},
            # torch's own AdamW, the same as under ddp, so that the arithmetic is the same.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        engine, *_ = deepspeed.initialize(
            model=loss if "offload_param" in offload else loss.to(self.device),
            optimizer=self._adamw(loss),
            config=config,
        )
        assert engine.zero_optimization_stage() == self.stage
        self.module = engine
        self.optimizer = engine.optimizer.optimizer
        self._create_states()

    def _create_states(self) -> None:
        """Give every flat partition its optimizer states now, not after the first step.

        They are then there to be filled on resume; and DeepSpeed, which links parameters to
        states when the first of several parameter groups has stepped, finds those of all groups.
        """
        zero = self.module.optimizer
        partitions = (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )
        for partition in partitions:
            zeros = {key: torch.zeros_like(partition) for key in STATES[1:]}
            self.optimizer.state[partition] = {"step": self._step_count(0), **zeros}
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def accumulate(self, scaled_loss: Callable[[], torch.Tensor], *, last: bool) -> torch.Tensor:
        loss = scaled_loss()
        # The loss is divided already by the tokens of the whole step.
        self.module.backward(loss, scale_wrt_gas=False)
        if not last:
            self.module.step()
        return loss.detach()

    def step(self) -> float:
        # DeepSpeed leaves out the update when the norm is not finite, and says so by its value.
        self.module.step()
        norm = float(self.module.get_global_grad_norm())
        return float("inf") if self.module.optimizer.overflow else norm

    def full(self, parameter: nn.Parameter, state: str) -> torch.Tensor:
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

        for state in self.optimizer.state.values():
            state["step"] = self._step_count(steps)
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


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        # Otherwise DeepSpeed looks for a GPU, and compiles an op for shared memory with g++.
        os.environ["DS_ACCELERATOR"] = "cpu"
    # What DeepSpeed calls by its old name; not for the user to mend.
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


def _truth(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
