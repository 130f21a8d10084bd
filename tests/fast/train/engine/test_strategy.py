"""Strategies: which one is asked for, what is refused, and what one optimizer step does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runfolder.errors import UserError
from tests.models import of_family
from train import tinyllama
from train.engine import checkpoint_reader, models, strategy
from train.engine.checkpoint import Checkpoints
from train.engine.loss import TokenLoss
from train.engine.once import staged_path
from train.engine.settings import CheckpointSettings, OptimizerSettings
from train.engine.strategy import base, zero
from train.engine.strategy.base import Strategy, assert_same_weights, assert_synchronised

NAMES = ("ddp", "fsdp2")


def token_loss(config: tinyllama.Config, device: torch.device) -> TokenLoss:
    assert config.staged is not None
    built = models.build(config, staged_path(config.staged.tokenizer), seed=1)
    return TokenLoss(built, device, bf16=False)


def prepared(
    config: tinyllama.Config,
    device: torch.device,
    name: str,
    settings: OptimizerSettings | None = None,
    loss: TokenLoss | None = None,
    resume: Any = None,
) -> Strategy:
    return strategy.prepare(
        loss or token_loss(config, device),
        settings or OptimizerSettings(lr=1e-2),
        name=name,
        device=device,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        resume=resume,
    )


def train_a_step(wrapped: Strategy, seed: int = 0, scale: float = 1 / 32) -> float:
    tokens = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(seed))
    wrapped.accumulate((tokens[:, :-1], tokens[:, 1:]), scale=torch.tensor(scale), last=True)
    return wrapped.step()


def weights(wrapped: Strategy) -> dict[str, torch.Tensor]:
    return {name: wrapped.full(p, "weight").clone() for name, p in wrapped.parameters()}


def moments(wrapped: Strategy) -> dict[str, torch.Tensor]:
    return {
        f"{key}/{name}": wrapped.full(parameter, key).clone()
        for name, parameter in wrapped.parameters()
        for key in ("exp_avg", "exp_avg_sq")
    }


# ---- bf16 ----


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("gpt2", {"n_head": 4}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("gemma2", {"head_dim": 8}),
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("mamba", {"state_size": 8}),
    ],
)
def test_models_of_any_family_train_in_bf16_under_each_strategy(
    family: str, more: dict[str, Any], config: tinyllama.Config, device: torch.device
) -> None:
    tokens = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(1))
    found = []
    for name, bf16 in (("ddp", False), ("ddp", True), ("fsdp2", True)):
        built = of_family(family, **{"vocab_size": 512, **more})
        wrapped = prepared(config, device, name, loss=TokenLoss(built, device, bf16=bf16))
        norm = train_a_step(wrapped)
        loss = float(wrapped.module(tokens[:, :-1], tokens[:, 1:].contiguous()).detach())
        assert {p.dtype for _, p in wrapped.parameters()} == {torch.float32}
        found.append((loss, norm))
    # bf16 has eight binary digits, and the loss is a sum over 32 tokens.
    for in_bf16 in found[1:]:
        assert in_bf16 == pytest.approx(found[0], rel=5e-3)


# ---- what the launcher's file asks for ----


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "ddp"),
        ({"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": "false"}, "ddp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2"),
        ({"ACCELERATE_USE_DEEPSPEED": "1", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
    ],
)
def test_the_strategy_is_read_from_what_the_launcher_sets(
    variables: dict[str, str], name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert strategy.name_from_environment() == name


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ZeRO stage none is not one of 1, 2, 3"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            "ZeRO stage 0 is not one of 1, 2, 3",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "set fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_version: 2"),
    ],
)
def test_a_strategy_that_is_not_supported_is_refused_not_replaced(
    variables: dict[str, str], words: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=words):
        strategy.name_from_environment()


def test_the_precision_is_bf16_or_none(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not strategy.bf16_from_environment()
    for value, expected in (("no", False), ("bf16", True)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
        assert strategy.bf16_from_environment() is expected
    for value in ("fp16", "fp8"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
        with pytest.raises(UserError, match=f"mixed_precision: {value} is not supported; use bf16"):
            strategy.bf16_from_environment()


def test_offload_to_disk_is_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme")
    assert zero._offload_device("optimizer") == "cpu"
    with pytest.raises(UserError, match="offload_param_device: nvme is not supported; use none"):
        zero._offload_device("param")


# ---- what is wrapped ----


def test_a_bare_model_is_refused_as_soon_as_there_are_two_processes(
    config: tinyllama.Config, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = nn.Linear(2, 2)
    wrapped = [nn.parallel.DistributedDataParallel(nn.Linear(2, 2))]
    wrapped.append(prepared(config, device, "fsdp2").module)
    assert_synchronised(bare)  # one process has nothing to synchronise
    monkeypatch.setattr(base, "world_size", lambda: 2)
    with pytest.raises(UserError, match="2 processes, but the model is a bare Linear"):
        assert_synchronised(bare)
    for module in wrapped:
        assert_synchronised(module)


def test_weights_that_differ_between_ranks_are_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_rank(tensor: torch.Tensor, operation: Any) -> None:
        # Another rank whose last parameter is larger by the least that fp32 can tell.
        if operation == torch.distributed.ReduceOp.MAX:
            tensor[-1] += 1e-7

    module = nn.Linear(2, 2)
    assert_same_weights(module, device)
    monkeypatch.setattr(base.dist, "all_reduce", other_rank)
    with pytest.raises(UserError, match="the processes start from different weights"):
        assert_same_weights(module, device)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_the_names_and_shapes_of_the_exported_model(
    config: tinyllama.Config, device: torch.device, name: str
) -> None:
    loss = token_loss(config, device)
    expected = {key: p.detach().clone() for key, p in loss.model.named_parameters()}
    found = weights(prepared(config, device, name, loss=loss))
    assert list(found) == list(expected)
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key


def test_only_matrices_decay(config: tinyllama.Config, device: torch.device) -> None:
    settings = OptimizerSettings(lr=1e-2, weight_decay=0.5)
    wrapped = prepared(config, device, "ddp", settings)
    before = weights(wrapped)
    # Gradients of zero: what moves is decayed.
    for parameter in wrapped.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    wrapped.step()
    for key, weight in weights(wrapped).items():
        factor = 1 - 1e-2 * 0.5 if weight.ndim == 2 else 1
        torch.testing.assert_close(weight, before[key] * factor)
    assert {weight.ndim for weight in before.values()} == {1, 2}


def test_the_settings_of_the_optimizer_reach_it(
    config: tinyllama.Config, device: torch.device
) -> None:
    settings = OptimizerSettings(lr=3e-4, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
    wrapped = prepared(config, device, "ddp", settings)
    assert [group["weight_decay"] for group in wrapped.optimizer.param_groups] == [0.3, 0.0]
    for group in wrapped.optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.9), 1e-6)
    wrapped.set_lr(1e-5)
    assert [group["lr"] for group in wrapped.optimizer.param_groups] == [1e-5, 1e-5]


# ---- a step ----


@pytest.mark.parametrize("name", NAMES)
def test_a_step_returns_the_norm_before_clipping_and_clips(
    config: tinyllama.Config, device: torch.device, name: str
) -> None:
    tight = OptimizerSettings(lr=1e-2, max_grad_norm=1e-3)
    clipped, free = (
        prepared(config, device, name, settings)
        for settings in (tight, OptimizerSettings(lr=1e-2, max_grad_norm=1e9))
    )
    norm = train_a_step(free)
    assert norm > 0.1
    assert train_a_step(clipped) == norm
    # The first moment is a tenth of the gradient that the optimizer saw.
    seen = [t for key, t in moments(clipped).items() if key.startswith("exp_avg/")]
    assert float(torch.stack([t.norm() for t in seen]).norm()) == pytest.approx(1e-4, rel=1e-3)
    assert all(p.grad is None for p in clipped.module.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(
    config: tinyllama.Config, device: torch.device, name: str, scale: float
) -> None:
    wrapped = prepared(config, device, name)
    train_a_step(wrapped)
    before = weights(wrapped) | moments(wrapped)
    assert not math.isfinite(train_a_step(wrapped, scale=scale))
    for key, tensor in (weights(wrapped) | moments(wrapped)).items():
        assert torch.equal(tensor, before[key]), key
    # Nor is anything of it left in the next step.
    assert math.isfinite(train_a_step(wrapped))


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_that_is_loaded_goes_on_bit_for_bit(
    config: tinyllama.Config, device: torch.device, tmp_path: Path, name: str
) -> None:
    straight = prepared(config, device, name)
    for step in range(3):
        train_a_step(straight, seed=step)
    Checkpoints(tmp_path, CheckpointSettings()).save(3, straight, {})
    train_a_step(straight, seed=3)

    folder = tmp_path / "step-00000003"
    loss = token_loss(config, device)
    checkpoint_reader.load_weights(loss.model, folder)
    resumed = prepared(
        config, device, name, loss=loss, resume=(3, checkpoint_reader.reader(folder)[0])
    )
    train_a_step(resumed, seed=3)
    expected = weights(straight) | moments(straight)
    for key, tensor in (weights(resumed) | moments(resumed)).items():
        assert torch.equal(tensor, expected[key]), key
    counts = {float(state["step"]) for state in resumed.optimizer.state.values()}
    assert counts == {4.0}


def test_the_parts_of_zero3_put_together_are_the_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = torch.arange(10.0).reshape(2, 5)
    parts = []
    for rank in range(4):
        monkeypatch.setattr(zero.dist, "get_rank", lambda rank=rank: rank)
        parts.append(zero.Zero._local_part(full, 3))
    # Four parts of three hold two more than the tensor: the last is padded.
    assert torch.cat(parts).tolist() == [*range(10), 0, 0]
