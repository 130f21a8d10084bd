"""Has accelerate, told to use gloo, prepare a model; it comes back bare, and that must be refused.

Two processes with RANK, WORLD_SIZE, MASTER_ADDR: -m tests.real.train.worker_bare_model
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from train.engine.errors import run_to_exit
from train.engine.strategy.base import assert_synchronised


def main(argv: list[str]) -> int:
    """Show that the trap is still one, then step into it."""
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    prepared = accelerator.prepare(model)
    assert (dist.get_world_size(), dist.get_backend()) == (2, "gloo")
    assert accelerator.num_processes == 2, "accelerate itself counts two"
    assert type(prepared) is nn.Linear, f"accelerate wraps the model now: {type(prepared)}"
    assert _gradients_differ(prepared), "accelerate synchronises a bare model now"

    # What is wrapped passes, and is synchronised.
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert not _gradients_differ(wrapped)
    assert_synchronised(wrapped)
    print("the trap is there", flush=True)
    assert_synchronised(prepared)
    print("not refused", flush=True)
    return 0


def _gradients_differ(model: nn.Module) -> bool:
    """Return whether the ranks, each with its own input, end with gradients of their own."""
    model.zero_grad()
    model(torch.full((1, 2), 1.0 + dist.get_rank())).sum().backward()
    mine = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    gathered = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return not torch.equal(*gathered)


if __name__ == "__main__":
    run_to_exit(main)
