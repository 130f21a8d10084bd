"""A node of an allocation as a process of this machine, which has torch from the start.

All are forked from one process that imported it, because that is most of what a check computes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.shared import CHECKOUT


def context() -> ForkServerContext:
    """Return what starts processes that have torch."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["torch", "torch.distributed"])
    return found


def check(environment: Mapping[str, str], output: Path, limits: Mapping[str, float]) -> None:
    """Run `python -m slurm.preflight check` in this process, with other limits in it."""
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(CHECKOUT)

    from slurm import preflight
    from slurm.health import collective, meeting, network

    for name, value in limits.items():
        for module in (collective, meeting, network):
            if hasattr(module, name):
                setattr(module, name, value)
    sys.exit(preflight.main(["check"]))
