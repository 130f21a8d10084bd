"""Ports for the rendezvous of a run's processes."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence

from runfolder.errors import UserError

# Below the kernel's range of ephemeral ports, for outgoing connections.
PORTS = range(20_000, 30_000)
MOST_TRIES = 100


def free_port(addresses: Sequence[str] = ("127.0.0.1",), *, first: int | None = None) -> int:
    """Return a port of `PORTS` that is free on these addresses of this machine.

    Ports are tried in order, starting with `first`, which may be any number, such as one made from
    a job ID so that jobs differ; without it, starting at random.

    Raises:
        UserError: a hundred of them are taken.
    """
    if first is None:
        first = random.randrange(len(PORTS))
    for offset in range(MOST_TRIES):
        port = PORTS[(first + offset) % len(PORTS)]
        if not any(_is_taken(address, port) for address in addresses):
            return port
    raise UserError(f"{MOST_TRIES} ports in a row are taken on this machine, up to {port}")


def _is_taken(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0
