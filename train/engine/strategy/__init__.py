"""What differs between ddp, zero1..3 and fsdp2; the only place that knows their names.

`accelerate launch` reads one file of configs/accelerate and passes it to each process through the
environment; here the model is wrapped accordingly. torch and DeepSpeed do the wrapping themselves,
and it is then checked, because a launcher's or a library's guess about the hardware has been seen
to leave a model unwrapped, and unsynchronised copies train with plausible losses.
"""

from __future__ import annotations

import os

import torch

from runfolder.errors import UserError
from train.engine.checkpoint_reader import ReadState
from train.engine.distributed import truth
from train.engine.loss import TokenLoss
from train.engine.settings import OptimizerSettings
from train.engine.source import Source, assert_same, place_whole
from train.engine.strategy.base import Strategy, assert_same_weights, assert_synchronised

# Of these each rank holds a part of the weights.
SPLIT = ("zero3", "fsdp2")


def name_from_environment() -> str:
    """Return the strategy that the launcher's file asked for: ddp, zero1, zero2, zero3 or fsdp2."""
    if truth("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        if stage not in ("1", "2", "3"):
            raise UserError(f"ZeRO stage {stage or 'none'} is not one of 1, 2, 3 (zero_stage)")
        return f"zero{stage}"
    if truth("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION") != "2":
            raise UserError("FSDP version 1 is not supported; set fsdp_version: 2")
        return "fsdp2"
    return "ddp"


def bf16_from_environment() -> bool:
    """Return whether the launcher's file says mixed_precision: bf16.

    Raises:
        UserError: it asks for fp16 or fp8, which need loss scaling or other hardware.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision: {precision} is not supported; use bf16 or no")
    return precision == "bf16"


def uses_bf16(precision: str, device_type: str) -> bool:
    """Return whether the setting `precision` (auto, bf16, fp32) means bf16 autocast here.

    Raises:
        UserError: as `bf16_from_environment`.
    """
    if precision == "auto":
        return device_type == "cuda" and bf16_from_environment()
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
    source: Source | None = None,
    reduce_dtype: str = "auto",
) -> Strategy:
    """Wrap a model (fp32, on the CPU, the same on every rank) for training.

    With a `source`, the model has no weights yet: each rank reads those that it holds. `resume`
    gives the optimizer steps done and the reader of the optimizer's states; the weights are in the
    model already, or in the source. `reduce_dtype` is the setting (auto, fp32).

    Raises:
        UserError: the ranks start from different weights.
    """
    if source is not None:
        assert_same(source)
        if name not in SPLIT:
            place_whole(loss.model, source, device)
            source = None
    if source is None:
        assert_same_weights(loss, device)
    reduce_bf16 = loss.bf16 and reduce_dtype == "auto"
    sizes = (micro_batch_size, gradient_accumulation_steps)
    arguments = (loss, settings, device, *sizes, source, reduce_bf16)
    strategy: Strategy
    # Each is imported where it is used: DeepSpeed is slow, and not installed on every machine.
    if name.startswith("zero"):
        from train.engine.strategy.zero import Zero

        strategy = Zero(*arguments, stage=int(name[-1]))
    elif name == "fsdp2":
        from train.engine.strategy.fsdp2 import Fsdp2

        strategy = Fsdp2(*arguments)
    else:
        from train.engine.strategy.ddp import Ddp

        strategy = Ddp(*arguments)
    assert_synchronised(strategy.module)
    if resume is not None:
        strategy.load_optimizer(*resume)
    return strategy
