"""What all strategies share: the loop's view of a wrapped model, and the checks of the wrapping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from runfolder.errors import UserError
from train.engine.checkpoint_reader import ReadState
from train.engine.distributed import world_size
from train.engine.loss import TokenLoss
from train.engine.settings import OptimizerSettings
from train.engine.source import Source

# The tensors of a parameter that make a checkpoint, always of the full shape and in fp32.
STATES = ("weight", "exp_avg", "exp_avg_sq")


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

    Also for a model that another library wrapped: accelerate, given gloo for plain DDP, silently
    returns the bare model.
    """
    if world_size() == 1:
        return
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if kinds.isdisjoint({"DistributedDataParallel", "DeepSpeedEngine", "FSDPModule"}):
        raise UserError(
            f"{world_size()} processes, but the model is a bare {type(module).__name__}: gradients "
            "would not be synchronised; launch with a file from configs/accelerate"
        )


class Strategy:
    """A model in training: the loop's view of what was wrapped."""

    # What wraps the model differs by strategy, and DeepSpeed adds to its parameters.
    module: Any
    optimizer: Any

    def __init__(
        self,
        loss: TokenLoss,
        settings: OptimizerSettings,
        device: torch.device,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        source: Source | None,
        reduce_bf16: bool,
    ) -> None:
        self.settings = settings
        # Whether gradients are rounded to bf16 where they travel.
        self.reduce_bf16 = reduce_bf16
        self.model_config = loss.model.config
        # How the model ends a text, for example; the base model's own, or made from its config.
        self.generation_config = getattr(loss.model, "generation_config", None)
        self.device = device
        self.micro_batch_size = micro_batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.build(loss, source)

    def build(self, loss: TokenLoss, source: Source | None) -> None:
        """Wrap the model and make the optimizer; with a `source` the model has no weights yet."""
        raise NotImplementedError

    def accumulate(
        self, batch: Sequence[torch.Tensor], *, scale: torch.Tensor, last: bool
    ) -> torch.Tensor:
        """Run a micro batch forward and backward; return its summed loss times `scale`.

        `batch` is what `TokenLoss.forward` takes: inputs, labels and perhaps positions, of (B, T).
        `last` ends the accumulation: gradients are averaged over the ranks with it, or before.
        """
        raise NotImplementedError

    def scaled_loss(self, batch: Sequence[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        """Return the loss of a micro batch through the wrapped model, ready for backward."""
        loss: torch.Tensor = self.module(*batch) * scale
        return loss

    def step(self) -> float:
        """Clip, step the optimizer, clear the gradients; return the gradient norm before clipping.

        With a norm that is not finite, the weights and the optimizer are unchanged.
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

    def parameters(self) -> Iterator[tuple[str, Any]]:
        """Yield the name (as in the model) and each trainable parameter, tied ones once."""
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            yield _plain(name), parameter

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name (as in the model) and the tensor of each buffer that belongs to its state.

        Such as the bias that corrects an expert's score (DeepSeek-V3); whole on every rank.
        """
        for prefix, part in self.module.named_modules():
            for name, buffer in part.named_buffers(recurse=False):
                if name not in part._non_persistent_buffers_set:
                    yield _plain(f"{prefix}.{name}"), buffer

    def full(self, parameter: Any, state: str) -> torch.Tensor:
        """Return one state of a parameter, gathered to its full shape; collective."""
        tensor = parameter.detach()
        if state != "weight":
            moments = self.optimizer.state[parameter]
            # Before the first step there are none; they begin as zeros.
            tensor = moments[state] if moments else torch.zeros_like(tensor)
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def load_optimizer(self, steps: int, read: ReadState) -> None:
        """Load the optimizer's state of a checkpoint after `steps` steps."""
        for name, parameter in self.parameters():
            state = self.optimizer.state[parameter]
            state["step"] = self._step_count(steps, parameter)
            for key in STATES[1:]:
                state[key] = self._like(parameter, read(name, key))

    def _like(self, parameter: Any, full: torch.Tensor) -> torch.Tensor:
        return full.to(self.device)

    def _step_count(self, steps: int, parameter: torch.Tensor) -> torch.Tensor:
        # The fused optimizer keeps its count beside the parameter.
        return torch.tensor(float(steps), device=parameter.device)

    def _adamw(self, module: nn.Module) -> torch.optim.AdamW:
        def is_matrix(parameter: Any) -> bool:
            # What ZeRO-3 has split is flat.
            return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2

        parameters = [p for p in module.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if is_matrix(p)]},
            {"params": [p for p in parameters if not is_matrix(p)], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            # DeepSpeed cannot flatten an empty group; adapters have only matrices.
            [group for group in groups if group["params"]],
            lr=self.settings.lr,
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.eps,
            weight_decay=self.settings.weight_decay,
            # One pass over a parameter and its states, also on a CPU.
            fused=True,
        )


def _plain(name: str) -> str:
    """Return the name in the model of a parameter or buffer of its wrapper."""
    return name.rpartition("module.")[2].removeprefix("model.")
