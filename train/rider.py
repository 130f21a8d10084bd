"""What sits beside a training script on each rank, whoever wrote the script.

    python -m train.rider train.tinyllama --config runs/tinyllama/.../config.yaml

It counts optimizer steps by torch's global hooks, ends processes that would train copies, tells
how far they are, and prints the stacks of all threads on USR2. It imports nothing of the training
libraries itself: a mistake in a setting is answered before torch is there.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
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

from runfolder import attempts, heartbeats
from runfolder.exit_codes import EXIT_BAD_INPUT

OPTIMIZER = "torch.optim.optimizer"
# Copies are compared when they have taken two steps: the first may have a learning rate of 0.
COMPARED_AFTER = 2
# Relative difference of gradients that no order of summation explains.
TOLERANCE = 1e-3
# How often rank 0 looks whether all ranks have told: one that never steps would be waited for.
MAX_LOOKS = 300
# Of each optimizer so many parameters are compared, of each so many values.
MAX_PARAMETERS, MAX_VALUES = 512, 1024


class Rider:
    """The steps of this rank, and what is made of them."""

    def __init__(self, attempt: Path | None) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.promised = int(os.environ.get("SLUICE_WORLD_SIZE", "1"))
        """The processes that the launcher was to start, on all nodes."""
        self.attempt = attempt
        self.end_after: int | None = None
        """Steps after which this process ends well: a rehearsal's."""
        self.may_differ = False
        """Whether ranks train models of their own on purpose."""
        self.strategy = "ddp"
        """What the script's model has to be wrapped for, once it trains."""
        self._counts: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._looks_left = MAX_LOOKS
        self._num_compared = 0
        self._most = 0
        self._notes: dict[str, list[Any]] = {}
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
        count = self._counts.get(optimizer, 0)
        if not self._numbers:
            self._first_step(optimizer)
        if count == 0:
            self._numbers[optimizer] = len(self._numbers)
            self._note(optimizer, "gradients", _norms)
        elif count == COMPARED_AFTER:
            self._note(optimizer, "weights", _digests)

    def after_step(self, optimizer: Any, *_: Any) -> None:
        """Count, and end a rehearsal that has come far enough."""
        self._counts[optimizer] = count = self._counts.get(optimizer, 0) + 1
        self._most = max(self._most, count)
        if self.end_after is not None and self.steps >= self.end_after:
            self._end_rehearsal()

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
            self._engine = _find({"DeepSpeedEngine"})
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
        is_sharded = any(hasattr(p, "device_mesh") for p in _parameters(optimizer))
        if not is_sharded and _find({"FullyShardedDataParallel", "FSDPModule"}) is None:
            self.refuse(
                f"ACCEL={self.strategy}: the script's model is not sharded; prepare it with "
                "accelerate's Accelerator, which shards on GPUs only, or leave ACCEL out"
            )

    # ---- copies that never meet ----

    def _note(self, optimizer: Any, key: str, measure: Callable[[list[Any]], list[Any]]) -> None:
        """Note what an optimizer's parameters are, if ranks should agree on them."""
        if self.promised < 2 or self.may_differ or self.attempt is None:
            return
        # Each rank of DeepSpeed's holds its own part. That it was imported says little: accelerate
        # imports it to look.
        if self._engine is not None:
            return
        parameters = _parameters(optimizer)
        # Of FSDP2 and tensor parallelism each rank has a part.
        if parameters and not any(hasattr(p, "device_mesh") for p in parameters):
            try:
                self._notes[f"{key} {self._numbers[optimizer]}"] = measure(parameters)
            except Exception as error:
                # A kind of tensor that was not thought of must not end a training.
                print(f"note: rank {self.rank}: {key} are not compared: {error}", file=sys.stderr)
                self.may_differ = True
            self.write()

    def compare(self) -> None:
        """End the run if the ranks train copies; nothing, as long as not all have told.

        Rank 0 looks again and again, and each rank at its end: the last one to come finds them all.
        """
        if self.attempt is None or self.promised < 2 or len(self._notes) == self._num_compared:
            return
        found = heartbeats.notes(self.attempt, self.promised)
        names = [key.partition(" ")[2] for key in found[0] if key.startswith("weights ")]
        for name in names:
            notes = [(one.get(f"gradients {name}"), one.get(f"weights {name}")) for one in found]
            if any(None in pair for pair in notes):
                return
            # Of FSDP's first version each rank has a part, in plain tensors.
            if _differ(notes) and _find({"FullyShardedDataParallel"}) is None:
                self.refuse(
                    f"after {COMPARED_AFTER} optimizer steps the {self.promised} processes hold "
                    "different weights, because gradients are not averaged between them: each "
                    "trains a copy of its own; wrap every model that is trained "
                    "(accelerator.prepare, DistributedDataParallel) and call the wrapped one, or "
                    "say `independent_ranks: true` in the job's file"
                )
        self._num_compared = len(self._notes)

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
        sys.exit(0)

    def write(self) -> None:
        """Write how far this rank is."""
        if self.attempt is None or self._started is None:
            return
        steps, elapsed = self.steps, time.monotonic() - self._started
        # The clock runs since the first step began.
        pace = elapsed / steps if steps else None
        with self._lock:
            heartbeats.beat(self.attempt, self.rank, steps, pace, self._notes)

    def _write_on(self) -> None:
        # Rank 0's is looked at by people; of many ranks the others spare the file system.
        interval_s = 2.0 if self.rank == 0 else max(5.0, self.promised / 20)
        written = -1
        while True:
            if (steps := self.steps) != written:
                self.write()
                written = steps
            if self.rank == 0 and self._looks_left and self._notes:
                self._looks_left -= 1
                self.compare()
            time.sleep(interval_s)


def _parameters(optimizer: Any) -> list[Any]:
    """Return the first parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]][:MAX_PARAMETERS]


def _norms(parameters: list[Any]) -> list[float]:
    grads = (p.grad for p in parameters)
    return [0.0 if grad is None else float(grad.detach().float().norm()) for grad in grads]


def _digests(parameters: list[Any]) -> list[str]:
    """Return a short hash of each parameter's first values."""
    found = []
    for parameter in parameters:
        values = parameter.detach().reshape(-1)[:MAX_VALUES].float().cpu()
        found.append(hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16])
    return found


def _differ(notes: list[tuple[Any, Any]]) -> bool:
    """Return whether a parameter is another on some rank, and its gradient was, too.

    Weights alone may differ in their last bits where the ranks' GPUs are not alike.
    """
    (norms, digests), *others = notes
    for own_norms, own_digests in others:
        rows = zip(norms, own_norms, digests, own_digests, strict=False)
        for a, b, digest, own_digest in rows:
            if digest != own_digest and abs(a - b) > TOLERANCE * max(abs(a), abs(b)):
                return True
    return False


def _find(names: set[str]) -> Any:
    """Return an object of a class of one of these names, or a subclass; None without one."""
    for thing in gc.get_objects():
        if any(base.__name__ in names for base in type(thing).__mro__):
            return thing
    return None


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
