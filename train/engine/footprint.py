"""What a training step keeps in memory besides weights and optimizer, found by taking one.

The step has no values (torch's fake tensors): it takes tenths of a second and no memory, whatever
the size of the model, and knows what each architecture keeps for its backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, PretrainedConfig

from train.engine import models
from train.engine.loss import TokenLoss
from train.engine.memory import Footprint


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered, as long as they live."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        # Storages by their address, which another may have later.
        self._made: dict[int, weakref.ref[Any]] = {}
        self.gradients = self.now = self.peak = self.peak_without_gradients = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, made)
        return made

    def start_anew(self) -> None:
        """Forget the peaks so far."""
        self.peak = self.peak_without_gradients = self.now

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        before = self._made.get(address)
        if address in self._known or (before and before() is not None):
            return

        def gone(_: object) -> None:
            self.now -= size

        self._made[address] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.peak_without_gradients = max(self.peak_without_gradients, self.now - self.gradients)


def of_step(
    config: PretrainedConfig,
    *,
    micro_batch_size: int,
    sequence_length: int,
    bf16: bool,
    gradient_checkpointing: bool,
) -> Footprint:
    """Return what a step of a language model takes.

    Raises:
        Exception: whatever a model raises that looks at values, which are not there.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if gradient_checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        loss = TokenLoss(model, torch.device("cpu"), bf16)
        tokens = torch.zeros(micro_batch_size, sequence_length, dtype=torch.int64)
        live = Live([*model.parameters(), *model.buffers()])

        def finished(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            live.gradients += parameter.grad.nbytes

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(finished)
        with live:
            total = loss(tokens, tokens)
            forward = live.peak
            live.start_anew()
            total.backward()
        layers = [sum(p.numel() for p in layer.parameters()) for layer in models.layers(model)]
        num_parameters = sum(p.numel() for p in model.parameters())
        return Footprint(
            num_parameters=num_parameters,
            layer_parameters=max(layers),
            other_parameters=num_parameters - sum(layers),
            forward=forward,
            backward=live.peak,
            backward_without_gradients=live.peak_without_gradients,
        )
