"""What a run does in the callbacks of the Trainer's loop: agree, check, record, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runfolder.moments import reached
from train.engine import guard, signals
from train.engine.classification import scores
from train.engine.distributed import agree, rank
from train.engine.metrics import Metrics, StepTimer, memory
from train.labs.ag_news.trainer import PaddedRows, RowLoss


class Watch(TrainerCallback):
    """Watches a training of `num_steps`, which is the part from `first_step` on of a run.

    The Trainer counts its own steps from 0; logs and checkpoints have the run's step number. All
    ranks have a watch, and do the same in each callback; rank 0 has the record.

    `validation` gives classes and labels, and `predict` the probabilities, of (N, C), of these
    rows; or None if a rank was asked to stop.
    """

    def __init__(
        self,
        *,
        seed: int,
        first_step: int,
        num_steps: int,
        global_batch_size: int,
        log_every_steps: int,
        evaluate_every_steps: int,
        validation: tuple[Sequence[str], Sequence[int]],
        predict: Callable[[bool], np.ndarray | None],
        loss: RowLoss,
        collate: PaddedRows,
        device: torch.device,
        record: Metrics | None,
        line: dict[str, Any],
        rehearse_at: int | None,
    ) -> None:
        self.seed, self.first_step, self.num_steps = seed, first_step, num_steps
        self.global_batch_size = global_batch_size
        self.log_every_steps, self.evaluate_every_steps = log_every_steps, evaluate_every_steps
        self.validation, self.predict = validation, predict
        self.loss, self.collate = loss, collate
        self.device, self.record, self.rehearse_at = device, record, rehearse_at
        self.line = line
        """The metrics of the newest step; part of a checkpoint, as they may not be written yet."""
        self.timer, self.row_timer = StepTimer(), StepTimer()
        self.stopping = False
        """Whether a rank was asked to stop; then the checkpoint is saved."""
        self.rehearsing = False
        self._started = self._step_tokens = self._data_seconds = 0.0

    # ---- the Trainer's callbacks, in order ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Record the step that training resumes from, with its saved metrics."""
        if state.global_step == 0 and self.first_step > 0:
            return  # The last line of the training before it has this number.
        if self._is_recorded(state.global_step):
            if self._is_scored(state.global_step) and "validation_loss" not in self.line:
                # To the end: the stop comes in the next step, and this line would stay incomplete.
                self._score(may_stop=False)
            self._write()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Seed dropout from seed, step and rank: a step is the same in every attempt."""
        # No two share a value: a step below a million, a rank below 65,537.
        step = state.global_step
        torch.manual_seed(((self.seed * 1_000_003 + step) * 65_537 + rank()) % 2**63)
        self._started = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Agree on loss and signals, in one all-reduce; stop before a step that is not finite."""
        local_loss = self.loss.take()
        tokens, places, data_seconds = self.collate.take()
        loss, stops, tokens, places = agree(
            local_loss, signals.received() is not None, tokens, places, device=self.device
        )
        step, size = self.first_step + state.global_step, self.global_batch_size
        positions = [[state.global_step * size, (state.global_step + 1) * size - 1]]
        guard.check_loss(local_loss, loss, step=step + 1, positions=positions)
        # After the clipping, which does not make a non-finite norm finite.
        gradients = [p.grad for p in more["model"].parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        guard.check_gradient(norm, step=step + 1, positions=positions)
        self.stopping = stops > 0
        before = self.line.get("tokens", 0.0)
        self.line = {"step": step + 1, "loss": loss, "tokens": before + tokens}
        self.line["padding"] = 1 - tokens / places
        self._step_tokens, self._data_seconds = tokens, data_seconds

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Tell the Trainer what to do next: log, save, stop."""
        reached("after-step")
        step = state.global_step
        seconds = time.perf_counter() - self._started + self._data_seconds
        for timer, count in (
            (self.timer, self._step_tokens),
            (self.row_timer, float(self.global_batch_size)),
        ):
            timer.add(tokens=count, seconds=seconds, data_seconds=self._data_seconds)
        self.line |= memory(self.device)
        if self.record:
            self.record.progress(self.first_step + step)
        if self.first_step + step == self.rehearse_at:
            self.rehearsing = True
            signals.rehearse()
        if self._is_recorded(step):
            control.should_log = True
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Complete the step's metrics with what the Trainer measured, score, and record."""
        logs = more["logs"]
        if "grad_norm" not in logs:
            return  # The Trainer's summary at the end.
        self.line |= {"lr": logs["learning_rate"], "grad_norm": logs["grad_norm"]}
        self.line |= self.timer.take()
        rows = self.row_timer.take()
        if rows:
            self.line["rows_per_second"] = rows["tokens_per_second"]
        if self._is_scored(state.global_step):
            # A step that is not scored because of a stop is recorded by the next attempt.
            if not self.stopping:
                self._score()
            if self.stopping:
                control.should_save = control.should_training_stop = True
                return
        self._write()

    # ---- the record ----

    def _is_scored(self, step: int) -> bool:
        return step % self.evaluate_every_steps == 0 or step == self.num_steps

    def _is_recorded(self, step: int) -> bool:
        return step % self.log_every_steps == 0 or self._is_scored(step)

    def _score(self, *, may_stop: bool = True) -> None:
        probabilities_NC = self.predict(may_stop)
        if probabilities_NC is None:
            self.stopping = True
            return
        classes, labels = self.validation
        found = scores.score(labels, probabilities_NC, classes)
        self.line |= {
            "validation_loss": scores.mean_loss(labels, probabilities_NC),
            "validation_accuracy": found.accuracy,
            "validation_macro_f1": found.macro_f1,
        }

    def _write(self) -> None:
        if self.record:
            self.record.write(self.line)
