"""Do the ranks train one model, or copies that never meet? Told by gradients and weights.

Ranks that average their gradients hold the same weights after the same steps. Each notes the norms
of its gradients at the first step and hashes of its weights two steps later; whoever finds the
notes of all ranks can tell.
"""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runfolder import heartbeats

# Copies are compared when they have taken two steps: the first may have a learning rate of 0.
COMPARED_AFTER = 2
# Relative difference of gradients that no order of summation explains.
TOLERANCE = 1e-3
# Of each optimizer so many parameters are compared, of each so many values.
MAX_PARAMETERS, MAX_VALUES = 512, 1024


class Copies:
    """What this rank has noted, and what it has compared of the others."""

    def __init__(self, world_size: int) -> None:
        self.notes: dict[str, list[Any]] = {}
        """By "gradients 0" and "weights 0" for each optimizer; part of the rank's heartbeat."""
        self.may_differ = False
        """Whether ranks hold different weights on purpose."""
        self._world_size = world_size
        self._num_compared = 0

    def note_gradients(self, number: int, optimizer: Any) -> None:
        """Note the norm of each gradient of the run's optimizer of this number."""
        self._note(f"gradients {number}", optimizer, _norms)

    def note_weights(self, number: int, optimizer: Any) -> None:
        """Note a hash of each of its parameters."""
        self._note(f"weights {number}", optimizer, _digests)

    def _note(self, key: str, optimizer: Any, measure: Callable[[list[Any]], list[Any]]) -> None:
        parameters = parameters_of(optimizer)
        # Of FSDP2 and tensor parallelism each rank has a part.
        has_parts = any(hasattr(p, "device_mesh") for p in parameters)
        if self._world_size < 2 or self.may_differ or has_parts or not parameters:
            return
        try:
            self.notes[key] = measure(parameters)
        except Exception as error:
            # A kind of tensor that was not thought of must not end a training.
            print(f"note: {key} are not compared between ranks: {error}", file=sys.stderr)
            self.may_differ = True

    def problem(self, attempt: Path) -> str | None:
        """Return what is wrong if the ranks train copies; None as long as not all have told."""
        if self._world_size < 2 or len(self.notes) == self._num_compared:
            return None
        found = heartbeats.notes(attempt, self._world_size)
        for name in [key.partition(" ")[2] for key in found[0] if key.startswith("weights ")]:
            notes = [(one.get(f"gradients {name}"), one.get(f"weights {name}")) for one in found]
            if any(None in pair for pair in notes):
                return None
            # Of FSDP's first version each rank has a part, in plain tensors.
            if _differ(notes) and find_object({"FullyShardedDataParallel"}) is None:
                return (
                    f"after {COMPARED_AFTER} optimizer steps the {self._world_size} processes hold "
                    "different weights, because gradients are not averaged between them: each "
                    "trains a copy of its own; wrap every model that is trained "
                    "(accelerator.prepare, DistributedDataParallel) and call the wrapped one, or "
                    "say `independent_ranks: true` in the job's file"
                )
        self._num_compared = len(self.notes)
        return None


def parameters_of(optimizer: Any) -> list[Any]:
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


def find_object(names: set[str]) -> Any:
    """Return an object of a class of one of these names, or a subclass; None without one."""
    for thing in gc.get_objects():
        if any(base.__name__ in names for base in type(thing).__mro__):
            return thing
    return None
