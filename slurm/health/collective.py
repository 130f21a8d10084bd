"""All-reduce over every process of the allocation: is the sum right, and how fast is it?

Runs in each process that takes part: one per node on CPUs (gloo), one per GPU otherwise (NCCL).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

MIB = 2**20
SIZES_BYTES = {"cpu": (MIB, 8 * MIB, 32 * MIB), "cuda": (8 * MIB, 64 * MIB, 512 * MIB)}
REPETITIONS = 4
# A size that would take longer is skipped: the smaller ones are enough by then.
LONGEST_SIZE_S = 1.5
# The most data sent over a link to time it.
MAX_LINK_BYTES = 256 * MIB


@dataclass(frozen=True, kw_only=True)
class Place:
    """The rank of a process among all that take part, and the settings of the measurement."""

    master_addr: str
    master_port: int
    # cpu or cuda.
    device: str
    # Rank and number of the processes, over all nodes and on this one.
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    floor_bytes_per_second: float
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The results; the speeds are the same in all processes."""

    sum_is_right: bool
    bandwidth_bytes_per_second: float
    # Of the links from each node to the next, around the ring; None unless below the floor.
    links_bytes_per_second: list[float] | None


def measure(place: Place) -> Measurement:
    """Meet the other processes and measure.

    Raises:
        RuntimeError: the processes cannot communicate, or lose their connection.
    """
    device = torch.device("cpu")
    if place.device == "cuda":
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=place.timeout_s)
    store = dist.TCPStore(place.master_addr, place.master_port, is_master=False, timeout=timeout)
    dist.init_process_group(
        "nccl" if place.device == "cuda" else "gloo",
        store=dist.PrefixStore("collective", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        device_id=device if place.device == "cuda" else None,
    )
    try:
        right = _sum_is_right(device)
        bandwidth = _bus_bandwidth(device)
        links = None
        if bandwidth < place.floor_bytes_per_second and place.world_size > place.local_world_size:
            links = _links(place, device)
    finally:
        dist.destroy_process_group()
    return Measurement(
        sum_is_right=right, bandwidth_bytes_per_second=bandwidth, links_bytes_per_second=links
    )


# ---- all-reduce -----------------------------------------------------------------------------


def _sum_is_right(device: torch.device) -> bool:
    """Sum integers with a known sum; there is no rounding, so the result must be exact."""
    pattern = torch.arange(100_003, device=device) % 1009
    total = pattern * (dist.get_rank() + 1)
    dist.all_reduce(total)
    world_size = dist.get_world_size()
    return torch.equal(total, pattern * (world_size * (world_size + 1) // 2))


def _bus_bandwidth(device: torch.device) -> float:
    """Return the best bus bandwidth in bytes per second over the sizes.

    That is 2 (n - 1) / n * bytes / seconds, which does not depend on the number of processes n:
    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    world_size = dist.get_world_size()
    best, last_s, last_bytes = 0.0, 0.0, 1
    for size_bytes in SIZES_BYTES[device.type]:
        # The seconds are the same everywhere, so that all ranks stop at the same size.
        if last_s * size_bytes / last_bytes * REPETITIONS > LONGEST_SIZE_S:
            break
        data = torch.zeros(size_bytes // 4, device=device)
        # Connections are opened and buffers allocated on the first use.
        dist.all_reduce(data)
        seconds = _slowest_s(partial(dist.all_reduce, data), device)
        best = max(best, 2 * (world_size - 1) / world_size * size_bytes / seconds)
        last_s, last_bytes = seconds, size_bytes
    return best


def _slowest_s(operation: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that one operation takes on average in the slowest process."""
    _wait(device)
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(REPETITIONS):
        operation()
    _wait(device)
    seconds = torch.tensor((time.perf_counter() - begin) / REPETITIONS, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- links between neighbours ---------------------------------------------------------------


def ring(num_nodes: int) -> list[tuple[int, int]]:
    """Return the links from each node to the next; two nodes have a single one."""
    if num_nodes == 2:
        return [(0, 1)]
    return [(node, (node + 1) % num_nodes) for node in range(num_nodes)]


def rounds(num_nodes: int) -> list[list[int]]:
    """Return the links of the ring in rounds, in each of which a node has one link at most."""
    links = range(len(ring(num_nodes)))
    odd_end = len(links) - 1 if num_nodes % 2 else None
    parts: list[list[int]] = [[], [], []]
    for link in links:
        parts[2 if link == odd_end else link % 2].append(link)
    return [part for part in parts if part]


def _links(place: Place, device: torch.device) -> list[float]:
    """Return the bytes per second of each link of the ring, the slower direction of each.

    The processes of a node send at the same time, each to the one with its local rank on the next
    node, because a node with several GPUs may have several network cards.
    """
    num_nodes = place.world_size // place.local_world_size
    node, ends = place.rank // place.local_world_size, ring(num_nodes)
    # A healthy link takes a tenth of a second.
    share = place.floor_bytes_per_second / place.local_world_size / 10
    size_bytes = round(min(max(share, MIB / 4), MAX_LINK_BYTES))
    data = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    speeds = torch.full((len(ends),), math.inf, dtype=torch.float64, device=device)
    for links in rounds(num_nodes):
        mine = next((link for link in links if node in ends[link]), None)
        dist.barrier()
        if mine is None:
            continue
        first, second = ends[mine]
        partner = (second if node == first else first) * place.local_world_size + place.local_rank
        # The first byte opens the connection.
        _there_and_back(data[:1], partner, node == first, device)
        slower_s = _there_and_back(data, partner, node == first, device)
        speeds[mine] = place.local_world_size * size_bytes / slower_s
    dist.all_reduce(speeds, op=dist.ReduceOp.MIN)
    return [float(speed) for speed in speeds]


def _there_and_back(data: torch.Tensor, partner: int, begins: bool, device: torch.device) -> float:
    """Send and receive, one after the other; return the seconds of the slower direction."""
    slower_s = 0.0
    for operation in (dist.send, dist.recv) if begins else (dist.recv, dist.send):
        begin = time.perf_counter()
        operation(data, partner)
        _wait(device)
        slower_s = max(slower_s, time.perf_counter() - begin)
    return slower_s


def slow_nodes(links: list[float], num_nodes: int, floor: float) -> list[int]:
    """Return the nodes that must be at fault for links (bytes per second) below the floor.

    That is a node whose links are all slow, next to one with a link that is not slow: that
    neighbour can do better. With two nodes, it cannot be determined.
    """
    slow = {ends: speed < floor for ends, speed in zip(ring(num_nodes), links, strict=True)}

    def all_slow(node: int) -> bool:
        return all(is_slow for ends, is_slow in slow.items() if node in ends)

    return [
        node
        for node in range(num_nodes)
        if all_slow(node)
        and any(not all_slow(other) for ends in slow if node in ends for other in ends)
    ]
