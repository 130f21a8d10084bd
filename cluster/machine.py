"""What the machine at hand has: GPUs, free ports."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

from cluster.errors import UserError

# Below the range from which the kernel takes ports for outgoing connections.
PORTS = range(20_000, 30_000)


def gpus() -> list[str]:
    """Return the GPUs that torch will see here, found without torch."""
    if os.environ.get("SLUICE_DEVICE") == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [device.strip() for device in visible.split(",")]
        return [device for device in named if device not in ("", "-1")]
    return [path.name for path in Path("/dev").glob("nvidia[0-9]*")]


def free_port() -> int:
    """Return a port of this machine that nobody listens on.

    Raises:
        UserError: there is none.
    """
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise UserError("no free port between 20000 and 30000 on this machine")
