"""The same training as others write it, a process each: how fast are its steps?

    python -m benchmarks.peer bare|trainer bf16|fp32 PRESET STEPS BATCH LENGTH

Prints the median of the rates, in tokens per second, of all steps after the first two.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from train.engine.presets import PRESETS

WARMUP_STEPS = 2


def main(kind: str, precision: str, steps: int, batch: int, length: int, preset: str) -> None:
    """Train on random tokens and print the rate as JSON."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**vars(PRESETS[preset])))
    rows = torch.randint(model.config.vocab_size, ((WARMUP_STEPS + steps) * batch, length))
    train = {"bare": _bare, "trainer": _trainer}[kind]
    ends = train(model, rows, batch, precision == "bf16")
    seconds = [end - start for start, end in pairwise(ends)][WARMUP_STEPS - 1 :]
    print(json.dumps({"tokens_per_second": batch * length / statistics.median(seconds)}))


def _bare(model: Any, rows: torch.Tensor, batch: int, bf16: bool) -> list[float]:
    """Train in the loop of a tutorial; return when each step ended."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ends = []
    for inputs in rows.split(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        ends.append(time.perf_counter())
    return ends


def _trainer(model: Any, rows: torch.Tensor, batch: int, bf16: bool) -> list[float]:
    """Train with the Hugging Face Trainer, which neither logs nor saves; return when steps end."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=bf16,
            per_device_train_batch_size=batch,
            max_steps=len(rows) // batch,
            weight_decay=0.1,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    return ends


if __name__ == "__main__":
    kind, precision, preset, *numbers = sys.argv[1:]
    steps, batch, length = map(int, numbers)
    main(kind, precision, steps, batch, length, preset)
