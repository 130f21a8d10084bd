"""settings.py: what each setting refuses, and how a batch divides among processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runfolder.errors import UserError
from tests.shared import CHECKOUT
from train.engine.config import LoopSettings
from train.engine.settings import (
    BatchSettings,
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    TextEvaluationSettings,
)

INFINITY = float("inf")


@pytest.mark.parametrize(
    ("settings", "values", "said"),
    [
        (ModelSettings, {"preset": "tinny"}, "model.preset: .*did you mean 'tiny'"),
        (ModelSettings, {"name": ""}, "model.name: is empty"),
        (DataSettings, {"sequence_length": 1}, "data.sequence_length: 1 is not between 2"),
        (DataSettings, {"train": "a"}, "data.train: is given without data.validation"),
        (DataSettings, {"validation": "a"}, "data.validation: is given without data.train"),
        (DataSettings, {"name": ""}, "data.name: is empty"),
        (BatchSettings, {"global_batch_size": 0}, "batch.global_batch_size: 0 is not positive"),
        (BatchSettings, {"micro_batch_size": -1}, "batch.micro_batch_size: -1 is not positive"),
        (OptimizerSettings, {"lr": 0.0}, "optimizer.lr: 0.0 is not positive"),
        (OptimizerSettings, {"lr": INFINITY}, "optimizer.lr: inf is not a finite number"),
        (OptimizerSettings, {"eps": float("nan")}, "optimizer.eps: nan is not a finite number"),
        (OptimizerSettings, {"beta1": 1.0}, "optimizer.beta1: 1.0 is not in"),
        (OptimizerSettings, {"weight_decay": -0.1}, "optimizer.weight_decay: -0.1 is negative"),
        (OptimizerSettings, {"max_grad_norm": 0.0}, "optimizer.max_grad_norm: 0.0 .* 1e9"),
        (ScheduleSettings, {"warmup_steps": -1}, "schedule.warmup_steps: -1 is negative"),
        (ScheduleSettings, {"min_lr_ratio": 1.1}, "schedule.min_lr_ratio: 1.1 is not between"),
        (EvaluationSettings, {"every_steps": 0}, "evaluation.every_steps: 0 is not positive"),
        (TextEvaluationSettings, {"max_tokens": 0}, "evaluation.max_tokens: 0 is not positive"),
        (CheckpointSettings, {"every_steps": 0}, "checkpoint.every_steps: 0 is not positive"),
        (CheckpointSettings, {"keep": 1}, "checkpoint.keep: 1 is less than 2"),
        (LoopSettings, {"max_steps": 0}, "max_steps: 0 is not positive"),
        (LoopSettings, {"log_every_steps": 0}, "log_every_steps: 0 is not positive"),
        (LoopSettings, {"seed": -1}, "seed: -1 is not between"),
        (LoopSettings, {"timeout_s": 0}, "timeout_s: 0 is not positive"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_setting(
    settings: Callable[..., Any], values: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        settings(**values)


def test_a_text_that_was_staged_may_be_gone() -> None:
    # On a compute node the paths of the laptop do not exist; what is read was packed before.
    assert DataSettings(train="/nowhere", validation="/nowhere").train == "/nowhere"


batches = st.integers(1, 300)
micros = st.none() | st.integers(1, 20)


@given(batches, micros, st.integers(1, 40))
def test_the_micro_batches_of_all_processes_make_the_global_batch_or_are_refused(
    global_batch_size: int, micro_batch_size: int | None, world_size: int
) -> None:
    batch = BatchSettings(global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)
    divides = global_batch_size % (world_size * (micro_batch_size or 1)) == 0
    if not divides:
        with pytest.raises(UserError, match=r"^batch\.(global|micro)_batch_size: "):
            batch.per_process(world_size)
        return
    micro, accumulation = batch.per_process(world_size)
    assert world_size * micro * accumulation == global_batch_size
    assert micro == (micro_batch_size or micro)
    assert micro_batch_size or micro <= 8


@given(batches, st.integers(1, 40))
def test_the_global_batch_that_a_refusal_offers_divides(
    global_batch_size: int, world_size: int
) -> None:
    try:
        BatchSettings(global_batch_size=global_batch_size).per_process(world_size)
    except UserError as error:
        offered = int(str(error).rpartition(" ")[2])
        BatchSettings(global_batch_size=offered).per_process(world_size)


def test_settings_and_staging_load_neither_torch_nor_the_hub() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'huggingface_hub', 'pyarrow'}"
    program = f"import sys, train.tinyllama, train.resolve; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
