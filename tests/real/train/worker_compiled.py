"""Trains as the script does, with what is compiled run by torch itself instead of compiled C++.

    python -m tests.real.train.worker_compiled ARGUMENTS OF train.tinyllama

That takes 2 seconds instead of 30, and leaves what is ours: which parts are traced, and how often.
"""

from __future__ import annotations

import functools

import torch
from torch._dynamo.utils import counters

from train import tinyllama
from train.engine.errors import run_to_exit


def main(argv: list[str]) -> int:
    """Run the script, and tell how many graphs were made."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    code = tinyllama.SCRIPT.main(argv)
    print(f"graphs: {counters['stats']['unique_graphs']}", flush=True)
    return code


if __name__ == "__main__":
    run_to_exit(main)
