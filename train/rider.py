"""What sits beside a training script on each rank, whoever wrote the script.

    python -m train.rider train.tinyllama --config runs/tinyllama/.../config.yaml

It counts optimizer steps by torch's global hooks, ends processes that would train copies, tells
how far they are, and prints the stacks of all threads on USR2. It imports nothing of the training
libraries itself: a mistake in a setting is answered before torch is there.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from runfolder import attempts, heartbeats, moments
from runfolder.exit_codes import EXIT_BAD_INPUT
from train.copies import COMPARED_AFTER, Copies, find_object, parameters_of

OPTIMIZER = "torch.optim.optimizer"
# How often rank 0 looks whether all ranks have told: one that never steps would be waited for.
MAX_LOOKS = 300


class Rider:
    """The steps of this rank, and what is made of them."""

    def __init__(self, attempt: Path | None) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.promised = int(os.environ.get("SLUICE_WORLD_SIZE", "1"))
        """The processes that the launcher was to start, on all nodes."""
        self.attempt = attempt
        self.end_after: int | None = None
        """Steps after which this process ends well: a rehearsal's."""
        self.copies = Copies(self.promised)
        self.strategy = "ddp"
        """What the script's model has to be wrapped for, once it trains."""
        self._counts: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._looks_left = MAX_LOOKS
        self._most = 0
        self._is_over = False
        self._engine: Any = None
        self._started: float | None = None
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def steps(self) -> int:
        """Optimizer steps of this process; of several optimizers those of the busiest."""
        # DeepSpeed steps torch's optimizer once for each group of parameters.
        own = getattr(self._engine, "global_steps", None)
        return int(own) if own is not None else self._most

    # ---- torch's hooks ----

    def before_step(self, optimizer: Any, *_: Any) -> None:
        """Refuse the first step of a process that is alone, and note what copies differ in."""
        if self._is_over:
            # A script that catches every exception, SystemExit too, would train on.
            sys.stdout.flush()
            os._exit(0)
        count = self._counts.get(optimizer, 0)
        if not self._numbers:
            self._first_step(optimizer)
        if count == 0:
            self._numbers[optimizer] = len(self._numbers)
            self._note(optimizer, self.copies.note_gradients)
        elif count == COMPARED_AFTER:
            self._note(optimizer, self.copies.note_weights)
        moments.reached("before-step")

    def after_step(self, optimizer: Any, *_: Any) -> None:
        """Count, and end a rehearsal that has come far enough."""
        self._counts[optimizer] = count = self._counts.get(optimizer, 0) + 1
        self._most = max(self._most, count)
        if self.end_after is not None and self.steps >= self.end_after:
            self._end_rehearsal()

    def _note(self, optimizer: Any, note: Callable[[int, Any], None]) -> None:
        # Each rank of DeepSpeed's holds its own part. That it was imported says little: accelerate
        # imports it to look.
        if self._engine is None:
            note(self._numbers[optimizer], optimizer)
            self.write()

    def _first_step(self, optimizer: Any) -> None:
        if self.promised > 1:
            dist = sys.modules.get("torch.distributed")
            joined = dist is not None and dist.is_available() and dist.is_initialized()
            world_size = dist.get_world_size() if dist is not None and joined else 1
            if world_size < self.promised:
                self.refuse(
                    f"the script took an optimizer step in a process group of {world_size}, and "
                    f"{self.promised} processes were started: each would train a copy of its own; "
                    "let it join them, as accelerate's Accelerator() or "
                    "torch.distributed.init_process_group() does, or ask for one process"
                )
        if "deepspeed" in sys.modules:
            self._engine = find_object({"DeepSpeedEngine"})
        self._check_strategy(optimizer)
        self._started = time.monotonic()
        if self.attempt is not None:
            self._writer = threading.Thread(target=self._write_on, name="rider", daemon=True)
            self._writer.start()

    def _check_strategy(self, optimizer: Any) -> None:
        """Refuse a script that trains in another way than was asked for."""
        if self.strategy.startswith("zero") and self._engine is None:
            self.refuse(
                f"ACCEL={self.strategy}: the script does not train with DeepSpeed; prepare its "
                "model and optimizer with accelerate's Accelerator, or leave ACCEL out"
            )
        if not self.strategy.startswith("fsdp"):
            return
        is_sharded = any(hasattr(p, "device_mesh") for p in parameters_of(optimizer))
        if not is_sharded and find_object({"FullyShardedDataParallel", "FSDPModule"}) is None:
            self.refuse(
                f"ACCEL={self.strategy}: the script's model is not sharded; prepare it with "
                "accelerate's Accelerator, which shards on GPUs only, or leave ACCEL out"
            )

    # ---- copies that never meet ----

    def compare(self) -> None:
        """End the run if the ranks train copies; rank 0 looks often, each rank at its end."""
        if self.attempt is not None and (problem := self.copies.problem(self.attempt)):
            self.refuse(problem)

    def refuse(self, message: str) -> NoReturn:
        """End this process, and so all, with one line; one rank says it."""
        marker = self.attempt / "refused" if self.attempt is not None else None
        is_first = marker is None or heartbeats.is_first(marker)
        if is_first:
            print(f"error: {message}", file=sys.stderr, flush=True)
        # The launcher ends the others when one ends: not before the line is out.
        if marker is not None:
            heartbeats.wait_until_said(marker, said=is_first)
        os._exit(EXIT_BAD_INPUT)

    # ---- how far ----

    def _end_rehearsal(self) -> NoReturn:
        dist = sys.modules.get("torch.distributed")
        if dist is not None and dist.is_available() and dist.is_initialized():
            # The last exchange of a step may still be under way on another rank.
            dist.barrier()
        self.compare()
        if self.rank == 0:
            print(f"dry run: ended after {self.steps} optimizer steps", flush=True)
        self.write()
        self._is_over = True
        sys.exit(0)

    def write(self) -> None:
        """Write how far this rank is."""
        if self.attempt is None or self._started is None:
            return
        steps, elapsed = self.steps, time.monotonic() - self._started
        # The clock runs since the first step began.
        pace = elapsed / steps if steps else None
        with self._lock:
            heartbeats.beat(self.attempt, self.rank, steps, pace, self.copies.notes)

    def _write_on(self) -> None:
        # Rank 0's is looked at by people; of many ranks the others spare the file system.
        interval_s = 2.0 if self.rank == 0 else max(5.0, self.promised / 20)
        written = -1
        while True:
            if (steps := self.steps) != written:
                self.write()
                written = steps
            if self.rank == 0 and self._looks_left and self.copies.notes:
                self._looks_left -= 1
                self.compare()
            time.sleep(interval_s)


class _Finder(MetaPathFinder):
    """Calls `loaded` with torch's module of optimizers once it is imported."""

    def __init__(self, loaded: Callable[[ModuleType], None]) -> None:
        self._loaded = loaded

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != OPTIMIZER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        loader, execute = spec.loader, spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            self._loaded(module)

        loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


def mount() -> Rider:
    """Have this process's optimizer steps counted from now on."""
    named = os.environ.get("SLUICE_RUN_FOLDER")
    rider = Rider(attempts.folder_of(Path(named), attempts.current()) if named else None)

    def register(module: Any) -> None:
        module.register_optimizer_step_pre_hook(rider.before_step)
        module.register_optimizer_step_post_hook(rider.after_step)

    if OPTIMIZER in sys.modules:
        register(sys.modules[OPTIMIZER])
    else:
        sys.meta_path.insert(0, _Finder(register))
    faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)
    return rider


current: Rider | None = None
"""This process's; None where a script was started without it."""


def main(argv: list[str]) -> None:
    """Run a module as the main one, with the rest of the words as its own."""
    global current
    current = mount()
    module, *words = argv
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        current.write()
        current.compare()


if __name__ == "__main__":
    # Of the module that others import, not of a second one of the same text.
    importlib.import_module("train.rider").main(sys.argv[1:])
