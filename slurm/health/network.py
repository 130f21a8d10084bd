"""The checks of a node that need the other nodes, and torch; each is recorded as it ends."""

import json
import re
import time
from contextlib import suppress
from pathlib import Path

from slurm.health.collective import Measurement, Place, measure, ring, slow_nodes
from slurm.health.gpus import Processes, check_count
from slurm.health.meeting import ANSWER_S, Meeting
from slurm.health.reach import cut_off, listen, unreachable
from slurm.health.report import Report, Unhealthy
from slurm.health.settings import Settings
from slurm.health.verdict import largest_group, skewed_clocks
from slurm.interface import use_interface_towards

# Network file systems may show a new file some seconds late.
FILES_APPEAR_S = 8.0
GB = 1e9


def check_network(settings: Settings, report: Report) -> None:
    """Do the checks that need torch, and record them: GPUs, then all that needs the other nodes."""
    ends = time.monotonic() + settings.preflight_timeout_s - report.seconds()
    processes, usable = None, True
    if settings.device == "cuda":
        report.begin("gpus", guilty=True)
        try:
            check_count(settings.gpus_per_node)
            processes = Processes("cuda", settings.gpus_per_node, settings.min_free_gpu_fraction)
            processes.check()
            report.passed(f"{settings.gpus_per_node} compute correctly")
        except Unhealthy as problem:
            report.failed(problem)
            usable = False

    if settings.num_nodes * settings.processes_per_node > 1:
        meeting = None
        try:
            _choose_interface(settings, report)
            meeting = Meeting(settings, report)
            usable = meeting.gather(usable)
            _compare_clocks(meeting)
            usable = _connect_all(meeting) and usable
            _look_for_files(meeting, ends)
            if usable:
                _all_reduce(meeting, processes, ends)
        except Unhealthy as problem:
            report.failed(problem)
        except RuntimeError as error:
            # Without torch's source location.
            text = re.sub(r"^\[[^]]*\] *", "", (str(error).splitlines() or ["no reason given"])[0])
            report.failed(Unhealthy(f"{report.content['during']}: failed ({text})"))
        if meeting is not None:
            meeting.leave(ends)
    if processes is not None:
        processes.end()


def _choose_interface(settings: Settings, report: Report) -> None:
    """Set the interface on which Gloo and NCCL reach the other nodes, unless it is set."""
    report.begin("interface", guilty=True)
    try:
        name = use_interface_towards(settings.master_addr, settings.interface)
    except (OSError, ValueError) as error:
        raise Unhealthy(f"network: {error}") from None
    report.passed(name)


def _compare_clocks(meeting: Meeting) -> None:
    """Compare the clocks of all nodes, which have just met."""
    meeting.report.begin("clock", guilty=False)
    clocks = meeting.exchange("clock", time.time(), ANSWER_S)
    off = skewed_clocks(clocks, meeting.settings.max_clock_skew_s)
    if meeting.rank not in off:
        spread = max(clocks) - min(clocks)
        meeting.report.passed(f"{spread:.3f} s between the first and the last")
        return
    seconds = off[meeting.rank]
    meeting.report.failed(
        Unhealthy(
            f"clock: {abs(seconds):.1f} s {'ahead' if seconds > 0 else 'behind'}"
            f", {meeting.settings.max_clock_skew_s:g} s allowed",
            # With two clocks, nobody knows which is right.
            guilty=meeting.num_nodes > 2,
        )
    )


def _connect_all(meeting: Meeting) -> bool:
    """Try the connections between all nodes; return whether all succeed."""
    meeting.report.begin("connections", guilty=False)
    try:
        listener, own = listen((meeting.settings.master_addr, meeting.settings.master_port))
    except OSError as error:
        raise Unhealthy(f"connections: cannot reach the head node ({error})") from None
    with listener:
        addresses = meeting.exchange("address", own, ANSWER_S)
        failed = unreachable([(address, port) for address, port in addresses])
        views = meeting.exchange("unreachable", failed, 2 * ANSWER_S)
    if failed:
        names = ", ".join(f"{meeting.names[rank]} ({addresses[rank][0]})" for rank in failed)
        text = f"connections: this node cannot connect to {names}"
        meeting.report.failed(Unhealthy(text, guilty=meeting.rank in cut_off(views)))
    elif meeting.rank in cut_off(views):
        others = ", ".join(
            meeting.names[rank] for rank, view in enumerate(views) if meeting.rank in view
        )
        meeting.report.failed(
            Unhealthy(f"connections: {others} cannot connect to this node", guilty=True)
        )
    else:
        meeting.report.passed(f"{len(addresses)} nodes")
    return not any(views)


def _look_for_files(meeting: Meeting, ends: float) -> None:
    """Check that each node sees the files of the others: one run folder for all."""
    meeting.report.begin("shared run folder", guilty=False)
    folder = meeting.report.file.parent
    tokens = meeting.exchange("token", meeting.report.content["token"], ANSWER_S)
    until = min(time.monotonic() + FILES_APPEAR_S, ends - ANSWER_S)
    while True:
        # Reading the folder makes a network file system ask its server again.
        with suppress(OSError):
            list(folder.iterdir())
        found = [_token_of(folder / f"node-{rank}.json") for rank in range(meeting.num_nodes)]
        seen = [rank for rank, token in enumerate(found) if token == tokens[rank]]
        if len(seen) == meeting.num_nodes or time.monotonic() > until:
            break
        time.sleep(0.2)
    views = meeting.exchange("seen", seen, FILES_APPEAR_S + ANSWER_S)
    elsewhere = sorted(set(range(meeting.num_nodes)) - largest_group(views))
    meeting.report.content["elsewhere"] = elsewhere
    unseen = [rank for rank in range(meeting.num_nodes) if rank not in seen]
    if not unseen:
        meeting.report.passed("all nodes see all files")
        return
    names = ", ".join(meeting.names[rank] for rank in unseen)
    meeting.report.failed(
        Unhealthy(
            f"run folder: the files of {names} do not appear here: another file system, or"
            " not writable there",
            guilty=meeting.rank in elsewhere,
        )
    )


def _token_of(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_text())["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _all_reduce(meeting: Meeting, processes: Processes | None, ends: float) -> None:
    """Do the all-reduce over all processes, and record whether it was right and fast enough."""
    settings, report = meeting.settings, meeting.report
    report.begin("all-reduce", guilty=False)
    local = settings.processes_per_node
    places = [
        Place(
            master_addr=settings.master_addr,
            master_port=settings.master_port,
            device=settings.device,
            rank=settings.node_rank * local + local_rank,
            world_size=settings.num_nodes * local,
            local_rank=local_rank,
            local_world_size=local,
            floor_bytes_per_second=settings.floor_bytes_per_second,
            timeout_s=max(1.0, ends - time.monotonic() - 3),
        )
        for local_rank in range(local)
    ]
    found = [measure(places[0])] if processes is None else processes.measure(places)
    bandwidth = found[0].bandwidth_bytes_per_second
    report.content["bandwidth_bytes_per_second"] = bandwidth
    right = meeting.exchange("sum", all(each.sum_is_right for each in found), ANSWER_S)
    if right[meeting.rank]:
        report.passed("the sum is right")
    else:
        # A sum that is wrong on all of several nodes does not show which node is at fault.
        guilty = any(right) or meeting.num_nodes == 1
        report.failed(Unhealthy("all-reduce: the sum is wrong", guilty=guilty))
    report.begin("bandwidth", guilty=False)
    floor = settings.floor_bytes_per_second
    if bandwidth >= floor:
        report.passed(f"{bandwidth / GB:.2f} GB/s")
    else:
        report.failed(_too_slow(found[0], meeting, floor))


def _too_slow(found: Measurement, meeting: Meeting, floor: float) -> Unhealthy:
    """Return the problem of an all-reduce below the floor: which links, and whose fault."""
    text = f"all-reduce {found.bandwidth_bytes_per_second / GB:.2f} GB/s"
    text += f", at least {floor / GB:.2f} GB/s required"
    links = found.links_bytes_per_second
    if links is None:
        return Unhealthy(text, guilty=meeting.num_nodes == 1)
    slow = [
        f"{meeting.names[first]}-{meeting.names[second]} {speed / GB:.2f} GB/s"
        for (first, second), speed in zip(ring(meeting.num_nodes), links, strict=True)
        if speed < floor
    ]
    text += f"; slow links: {', '.join(slow) or 'none individually'}"
    if meeting.rank in slow_nodes(links, meeting.num_nodes, floor):
        return Unhealthy(f"{text}; all links of this node are slow", guilty=True)
    return Unhealthy(text)
