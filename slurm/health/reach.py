"""Can each node open a connection to each other one, not only to the head node?

A node whose firewall or route is wrong joins the rendezvous and makes the all-reduce hang, which
does not show between which nodes.
"""

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

CONNECT_TIMEOUT_S = 3.0
# Connections that are tried at a time.
THREADS = 32


def listen(towards: tuple[str, int]) -> tuple[socket.socket, tuple[str, int]]:
    """Return a listening socket, and its address as seen by hosts that are reached like `towards`.

    The kernel accepts the connections: nobody has to answer.

    Raises:
        OSError: `towards`, an address and a port, cannot be connected to.
    """
    with socket.create_connection(towards, CONNECT_TIMEOUT_S) as probe:
        family, address = probe.family, probe.getsockname()[0]
    listener = socket.socket(family)
    listener.bind((address, 0))
    listener.listen(1024)
    return listener, (address, listener.getsockname()[1])


def unreachable(addresses: Sequence[tuple[str, int]]) -> list[int]:
    """Return the indices of the addresses that cannot be connected to."""

    def reaches(address: tuple[str, int]) -> bool:
        try:
            socket.create_connection(address, CONNECT_TIMEOUT_S).close()
        except OSError:
            return False
        return True

    with ThreadPoolExecutor(THREADS) as threads:
        return [index for index, ok in enumerate(threads.map(reaches, addresses)) if not ok]


def wait_until_reachable(address: tuple[str, int], wait_s: float) -> bool:
    """Try to connect until it succeeds; return whether it did within the time."""
    ends = time.monotonic() + wait_s
    while True:
        if not unreachable([address]):
            return True
        if time.monotonic() > ends:
            return False
        time.sleep(0.1)


def cut_off(views: Sequence[Sequence[int]]) -> list[int]:
    """Return the nodes at fault for connections that fail.

    That is the one node that is part of all of them, or a minority that have no connection to any
    other node. With two nodes, it cannot be determined.

    Args:
        views: by rank, the ranks that it could not connect to.
    """
    ranks = range(len(views))
    failed = {frozenset((rank, other)) for rank in ranks for other in views[rank]}
    if len(ranks) < 3 or not failed:
        return []
    part_of_all = [rank for rank in ranks if all(rank in pair for pair in failed)]
    if len(part_of_all) == 1:
        return part_of_all
    alone = [
        rank
        for rank in ranks
        if all(frozenset((rank, other)) in failed for other in ranks if other != rank)
    ]
    return alone if len(alone) < len(ranks) / 2 else []
