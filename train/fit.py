"""Say how much memory a process of a language-model job needs, and what would make it fit.

    python -m train.fit train.tinyllama --config=FILE --gib=80 --said=FILE

The strategy, the number of processes and the device are those of the environment, as in a run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.engine import arguments, memory, staging
from train.engine.config import TrainingConfig
from train.engine.errors import run_to_exit
from train.engine.memory import Footprint
from train.engine.once import staged_path
from train.engine.script import Script

GIB = 2**30
# The part of a device's memory that tensors may have; CUDA and NCCL need some, too.
TIGHT = 0.9
# A process on a CPU has at most so much for its imports, and for gaps between tensors.
LIBRARIES, GAPS = 0.5 * GIB, 1.3
# The fastest first. With several micro batches in a step, zero3 holds less than fsdp2.
ORDER = ("ddp", "zero1", "zero2", "fsdp2", "zero3")
# More than this many times the nodes is another job.
MOST_TIMES = 16


@dataclass(frozen=True)
class Choice:
    """What decides how much memory a process needs, but for the model."""

    strategy: str
    world_size: int
    micro_batch_size: int
    gradient_checkpointing: bool


def main(argv: list[str]) -> int:
    """Write one or two lines to --said; return 0. --gib=0: the room is unknown."""
    name, *words = argv
    given = dict(word.removeprefix("--").split("=", 1) for word in words)
    script: Script[Any] = importlib.import_module(name).SCRIPT
    wanted = ["--config", given["config"]]
    config = arguments.parse(script.config_class, wanted, prog=name, dry_run=script.dry_run)
    room = float(given["gib"]) * GIB
    if room and os.environ["SLUICE_DEVICE"] == "cpu":
        room = max(0.0, room - LIBRARIES) / GAPS
    Path(given["said"]).write_text("\n".join(_lines(config, room)) + "\n")
    return 0


def _lines(config: Any, room: float) -> Iterator[str]:
    if not isinstance(config, TrainingConfig):
        yield "not predicted for this script; it is for language models"
        return
    if getattr(config, "method", "full") != "full":
        yield "not predicted with adapters"
        return
    world_size = int(os.environ["SLUICE_WORLD_SIZE"])
    accel = os.environ["SLUICE_ACCEL"]
    if accel not in ORDER:
        yield f"not predicted for {accel}"
        return
    micro_batch_size, _ = config.batch.per_process(world_size)
    chosen = Choice(accel, world_size, micro_batch_size, config.model.gradient_checkpointing)
    predict = Predictor(config)
    try:
        needs = predict(chosen)
    except Exception as error:  # whatever a model raises that looks at values
        yield f"not predicted: the model cannot be tried without values ({type(error).__name__})"
        return
    said = f"{_size(needs)} of tensors in each process"
    if not room:
        yield f"{said}; whether they fit is unknown"
        return
    has = f"of {_size(room)}"
    if needs <= TIGHT * room:
        yield f"{said}, {has}: fits"
        return
    yield f"{said}, {has}: {'tight' if needs <= room else 'does not fit'}"
    for change, words in changes(chosen, config.batch.global_batch_size):
        if (would_need := predict(change)) <= TIGHT * room:
            yield f"it fits with {words}: {_size(would_need)}"
            return
    yield "no strategy, micro batch or number of nodes makes it fit"


def _size(number: float) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"


class Predictor:
    """The bytes that a process of a job needs, for any choice of strategy and sizes."""

    def __init__(self, config: TrainingConfig) -> None:
        # torch only now: all that can be refused is.
        from train.engine import models
        from train.engine.pretrained import read_config
        from train.engine.strategy import uses_bf16

        assert config.staged is not None
        folder = staged_path(config.staged.model) if config.staged.model else None
        self._sequence_length = staging.sequence_length(config, folder)
        self._bf16 = uses_bf16(config.precision, os.environ["SLUICE_DEVICE"])
        if folder:
            self._model = read_config(folder)
        else:
            assert config.model.preset is not None
            tokenizer = staged_path(config.staged.tokenizer)
            self._model = models.preset_config(config.model.preset, tokenizer)
        self._global_batch_size = config.batch.global_batch_size
        self._footprints: dict[tuple[int, bool], Footprint] = {}

    def __call__(self, choice: Choice) -> int:
        from train.engine import footprint

        key = (choice.micro_batch_size, choice.gradient_checkpointing)
        if key not in self._footprints:
            self._footprints[key] = footprint.of_step(
                self._model,
                micro_batch_size=choice.micro_batch_size,
                sequence_length=self._sequence_length,
                bf16=self._bf16,
                gradient_checkpointing=choice.gradient_checkpointing,
            )
        found = self._footprints[key]
        return memory.predict(
            found,
            choice.strategy,
            choice.world_size,
            bf16=self._bf16,
            accumulates=choice.micro_batch_size * choice.world_size < self._global_batch_size,
        )


def changes(chosen: Choice, global_batch_size: int) -> Iterator[tuple[Choice, str]]:
    """Yield other choices and their words, the smallest change first; the curve stays the same."""
    size = chosen.micro_batch_size
    smaller = [micro for micro in range(size - 1, 0, -1) if size % micro == 0]
    for micro in smaller:
        words = f"--batch.micro_batch_size {micro}"
        yield replace(chosen, micro_batch_size=micro), words
    recomputing = replace(chosen, gradient_checkpointing=True)
    if not chosen.gradient_checkpointing:
        yield recomputing, "--model.gradient_checkpointing true"
    least = replace(recomputing, micro_batch_size=1)
    most = "--batch.micro_batch_size 1 --model.gradient_checkpointing true"
    yield least, most
    after = ORDER[ORDER.index(chosen.strategy) + 1 :]
    for strategy in after if chosen.world_size > 1 else []:
        yield replace(chosen, strategy=strategy), f"ACCEL={strategy}"
        yield replace(least, strategy=strategy), f'ACCEL={strategy} ARGS="{most}"'
    times = 2
    while times <= MOST_TIMES and global_batch_size % (times * chosen.world_size) == 0:
        for split in ("fsdp2", "zero3"):
            more = replace(least, strategy=split, world_size=times * chosen.world_size)
            yield more, f'{times} times as many nodes, ACCEL={split} ARGS="{most}"'
        times *= 2


if __name__ == "__main__":
    run_to_exit(main)
