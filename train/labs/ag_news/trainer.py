"""The Hugging Face Trainer with Sluice's order of rows, learning rate and atomic checkpoints.

A few of its methods are replaced; the loop, the optimizer, the wrapping in DDP, and the content of
a checkpoint are the Trainer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from runfolder.files import write_json
from train.engine import encoders
from train.engine.checkpoint import Checkpoints
from train.engine.checkpoint_reader import FORMAT, read_state
from train.engine.distributed import is_main_process, rank, world_size
from train.engine.durable import describe
from train.engine.strategy.base import assert_synchronised
from train.labs.ag_news.grouped import GroupedBatches


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run resumes."""

    folder: Path | None = None
    """The checkpoint, or None for a new run."""
    number: int = 0
    """Which of its trainings, one for each seed."""
    step: int = 0
    """Optimizer steps taken so far, in all trainings."""
    line: dict[str, Any] = field(default_factory=lambda: {"step": 0})
    """The metrics of the step, which may not be logged yet."""


class TrainerCheckpoints(Checkpoints):
    """Checkpoints that the Trainer writes: its files, and our state.json and manifest.json."""

    @property
    def unpublished(self) -> Path:
        """The hidden folder that the Trainer writes into; cleared when a run starts."""
        return self.folder / ".trainer"

    def publish(
        self, step: int, written: Path, state: dict[str, Any], problem: str | None = None
    ) -> None:
        """Make what the ranks wrote into a folder visible as checkpoint `step`; collective.

        `problem` says what kept this rank from writing its part.

        Raises:
            RunFailed: a rank could not write; the checkpoint is removed.
        """
        if problem is None:
            try:
                files = _files_of_this_rank(written)
                if is_main_process():
                    state = {"format": FORMAT, "step": step, **state}
                    write_json(written / "state.json", state)
                    files.append(written / "state.json")
                for file in files:
                    # safetensors creates files that only the owner can read.
                    file.chmod(written.stat().st_mode & 0o666)
                self._report = {"files": {file.name: describe(file) for file in files}}
            except OSError as error:
                problem = str(error)
        if problem is not None:
            self._report = {"error": f"rank {rank()}: {problem}"}
        self._pending = (step, written)
        self.finish()

    def restore(self, must_match: Mapping[str, Any]) -> Start:
        """Return where the run resumes: at its newest complete checkpoint, or at step 0.

        `must_match` holds the values that the position in the data depends on.

        Raises:
            UserError: the checkpoint was made with other values than `must_match`.
        """
        newest = self.newest()
        if newest is None:
            return Start()
        state = read_state(newest, must_match)
        return Start(folder=newest, number=state["number"], step=state["step"], line=state["line"])


def _files_of_this_rank(folder: Path) -> list[Path]:
    """Return the files that this rank wrote: its random state, and on rank 0 the rest."""
    own = folder / f"rng_state_{rank()}.pth" if world_size() > 1 else folder / "rng_state.pth"
    if not is_main_process():
        return [own]
    rest = (file for file in folder.iterdir() if not file.name.startswith("rng_state"))
    return [own, *(file for file in rest if file.name != "state.json")]


class PaddedRows:
    """Makes a batch of rows, padded to the longest; counts tokens, padding and time."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id
        self._counts = [0.0, 0.0, 0.0]

    def __call__(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        ids, mask = encoders.pad([ids for ids, _ in rows], self.pad_id)
        labels = torch.tensor([label for _, label in rows])
        seconds = time.perf_counter() - started
        for place, count in enumerate((float(mask.sum()), float(mask.numel()), seconds)):
            self._counts[place] += count
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def take(self) -> list[float]:
        """Return, since the last call: tokens, tokens with padding, seconds spent here."""
        counts, self._counts = self._counts, [0.0, 0.0, 0.0]
        return counts


class RowLoss:
    """The mean loss over the rows of a step, of all processes and micro batches.

    The Trainer counts the rows of the step over all processes and multiplies the loss by the
    number of processes, over which DDP averages: the gradient is that of the mean over the rows.
    """

    def __init__(self) -> None:
        self._local: torch.Tensor | float = 0.0

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor
    ) -> torch.Tensor:
        total = nn.functional.cross_entropy(outputs["logits"].float(), labels, reduction="sum")
        loss: torch.Tensor = total / num_items_in_batch
        self._local = self._local + loss.detach()
        return loss

    def take(self) -> float:
        """Return this process's part of the step's loss; the parts of all add up to it."""
        local, self._local = float(self._local), 0.0
        return local


class LabTrainer(Trainer):
    """The Trainer, with rows in the order of `batches` and the learning rate of our schedule.

    `rate(step)` is a step's fraction of the peak learning rate. `state()` is what a checkpoint
    holds besides the Trainer's own files, as JSON; its `line` has the step of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rows: Sequence[tuple[list[int], int]],
        *,
        batches: GroupedBatches,
        collate: PaddedRows,
        loss: RowLoss,
        rate: Callable[[int], float],
        checkpoints: TrainerCheckpoints,
        state: Callable[[], dict[str, Any]],
        callback: TrainerCallback,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=rows,
            compute_loss_func=loss,
            callbacks=[callback],
        )
        self.remove_callback(PrinterCallback)
        self.rows, self.batches, self.rate = rows, batches, rate
        self.checkpoints, self.checkpoint_state = checkpoints, state
        self._is_checked = False

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's micro batches of the whole run, as one epoch.

        The Trainer's own loader draws the order from a generator, which has another state when a
        run resumes in its second epoch, and its length groups depend on the number of processes.
        """
        return DataLoader(
            self.rows,  # type: ignore[arg-type]
            batch_sampler=self.batches,  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            pin_memory=self.args.device.type == "cuda",
        )

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Train on a micro batch, through a model that is known to be synchronised."""
        if not self._is_checked:
            assert_synchronised(getattr(model, "_orig_mod", model))  # compiled or not
            self._is_checked = True
        return super().training_step(model, inputs, num_items_in_batch)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Set the learning rate by Sluice's common schedule."""
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = LambdaLR(optimizer, self.rate)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's moments, but keep the settings of this attempt.

        The Trainer would take learning rate, betas and weight decay from the checkpoint, whatever
        the command line says.
        """
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        assert optimizer is not None
        assert scheduler is not None
        names = ("initial_lr", "betas", "eps", "weight_decay")
        given = [{name: group[name] for name in names} for group in optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        part = self.rate(scheduler.last_epoch)
        for group, settings in zip(optimizer.param_groups, given, strict=True):
            group |= settings | {"lr": settings["initial_lr"] * part}
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Have the Trainer write its checkpoint to a hidden folder, then publish it."""
        problem = None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            # Any error goes to the other ranks, which wait for this one's report.
            problem = str(error) or type(error).__name__
        written = self.checkpoints.unpublished / f"checkpoint-{self.state.global_step}"
        state = self.checkpoint_state()
        self.checkpoints.publish(state["line"]["step"], written, state, problem)
