"""Every strategy in one launch: what the launcher makes of each file of configs/accelerate.

That the launcher does is tested with the files themselves: test_make.py, tests/cluster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

STRATEGIES: dict[str, dict[str, str]] = {
    "ddp": {},
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}


def each() -> Iterator[str]:
    """Yield the name of each strategy, while the environment asks for it."""
    for accel, variables in STRATEGIES.items():
        for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
            os.environ.pop(name, None)
        os.environ |= variables
        yield accel
