"""What every training script does around its `train`: settings, the run folder, the processes."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from runfolder import moments
from runfolder.errors import UserError
from runfolder.exit_codes import of_outcome
from runfolder.lock import lock
from train.engine import arguments, signals
from train.engine.errors import said_of_the_disk
from train.engine.story import say

if TYPE_CHECKING:
    import torch

# With run_folder, staged, dry_run and timeout_s (config.LoopSettings has most of them).
Config = TypeVar("Config", bound=Any)


@dataclass(frozen=True, kw_only=True)
class Script(Generic[Config]):
    """A training script: its settings, and the two functions that are its own."""

    prog: str
    config_class: type[Config]
    dry_run: dict[str, Any]
    """What --dry_run changes; the command line still overrides it."""
    stage: Callable[..., Config]
    """(config, *, online) -> config with `staged` filled in."""
    train: Callable[..., str]
    """(config, run_folder, device, *, rehearse_stop) -> finished, stopped or rehearsed."""

    def main(self, argv: list[str]) -> int:
        """Run the script; return its exit code."""
        signals.install_first()
        signals.die_with_launcher()
        moments.check()
        config = arguments.parse(self.config_class, argv, prog=self.prog, dry_run=self.dry_run)
        named = config.run_folder or os.environ.get("SLUICE_RUN_FOLDER")
        if not named:
            raise UserError("run_folder: is not set; use `make run`, or give --run_folder")
        run_folder = Path(named)
        if config.staged is None:
            with said_of_the_disk():
                config = self.stage(config, online=False)
        if os.environ.get("RANK", "0") == "0":
            run_folder.mkdir(parents=True, exist_ok=True)
            lock(run_folder)  # held until this process ends, however it ends

        # torch and transformers only now, so that a mistake above is reported at once. What they
        # create stays; repeated garbage collection would take a fifth of their import time.
        gc.disable()
        from train.engine import guard
        from train.engine.distributed import check_promises, init_distributed, is_main_process

        check_promises()
        importlib.import_module("train.engine.models")
        gc.freeze()
        gc.enable()
        moments.reached("loaded")
        signals.install()
        device: torch.device = init_distributed(config.timeout_s)
        with guard.in_one_line():
            outcome = self.train(config, run_folder, device, rehearse_stop=config.dry_run)
            if outcome == "rehearsed":
                if is_main_process():
                    say("dry run: stopped as a cluster would stop it; resuming from the checkpoint")
                signals.forget_rehearsal()
                outcome = self.train(config, run_folder, device, rehearse_stop=False)
        return of_outcome(outcome)


def only_under_ddp(job: str) -> None:
    """Reject other strategies while a run is resolved, before it is queued.

    Raises:
        UserError: the strategy that was asked for (SLUICE_ACCEL) is not ddp.
    """
    accel = os.environ.get("SLUICE_ACCEL", "ddp")
    if accel != "ddp":
        raise UserError(f"ACCEL={accel}: the lab {job} runs under ddp only; leave ACCEL out")
