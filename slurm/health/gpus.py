"""The GPUs of one node: is each there, does it compute, is it free, what does its driver say?

Each GPU has its own process, which takes part in the all-reduce later. The process that started
them never opens a GPU: if the site allows only one process per GPU, it would be in the way.
"""

import importlib
import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import torch

from slurm.health.collective import Measurement, Place, measure
from slurm.health.report import Unhealthy

GIB = 2**30
# How long a process may take to release its GPU.
END_S = 5.0


class Processes:
    """One child process for each GPU of this node."""

    def __init__(self, device: str, count: int, min_free_fraction: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        self.processes = []
        for index in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_process, args=(theirs, device, index, min_free_fraction), daemon=True
            )
            process.start()
            self.processes.append(process)
            # With our copy open, the death of the child would go unnoticed.
            theirs.close()
            self.connections.append(ours)

    def check(self) -> None:
        """Wait for the processes' reports on their GPUs.

        Raises:
            Unhealthy: a check of one of the GPUs failed.
        """
        answers = [_answer(connection, "check") for connection in self.connections]
        problems = [
            f"GPU {index}: {answer}" for index, answer in enumerate(answers) if answer != "well"
        ]
        if problems:
            raise Unhealthy("; ".join(problems))

    def measure(self, places: list[Place]) -> list[Measurement]:
        """Let the processes do the all-reduce, and return what each measured.

        Raises:
            RuntimeError: a process failed.
        """
        for connection, place in zip(self.connections, places, strict=True):
            connection.send(place)
        found = [_answer(connection, "all-reduce") for connection in self.connections]
        for answer in found:
            if isinstance(answer, str):
                raise RuntimeError(answer)
        return found

    def end(self) -> None:
        """Let the processes end, or kill them."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(END_S)
            process.kill()


def _answer(connection: Connection, what: str) -> Any:
    """Return a child's answer: its result, or a sentence on what went wrong."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return f"its process died during the {what}"


def _process(connection: Connection, device: str, index: int, min_free_fraction: float) -> None:
    """The child process: check the GPU, report, wait for its place in the all-reduce, report."""
    try:
        check_device(torch.device(device, index), min_free_fraction)
        connection.send("well")
    except (Unhealthy, RuntimeError) as problem:
        connection.send(_first_line(problem))
    try:
        place = connection.recv()
    except EOFError:
        return
    try:
        connection.send(measure(place))
    except RuntimeError as problem:
        connection.send(_first_line(problem))


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def check_count(wanted: int) -> None:
    """Check that this node has as many GPUs as the job requested per node.

    Raises:
        Unhealthy: there are more or fewer.
    """
    seen = torch.cuda.device_count()
    if seen != wanted:
        raise Unhealthy(f"GPUs: {seen} found, {wanted} required")


def check_device(device: torch.device, min_free_fraction: float) -> None:
    """Check one GPU by a product that is known exactly, its free memory and its driver.

    Raises:
        Unhealthy: a check failed.
        RuntimeError: it cannot be used at all.
    """
    # Small integers, so that no precision of any GPU rounds: the products must be equal.
    left = (torch.arange(512 * 512) * 7 % 16).reshape(512, 512).float()
    right = (torch.arange(512 * 512) * 5 % 16).reshape(512, 512).float()
    product = (left.to(device) @ right.to(device)).cpu()
    if not torch.equal(product, left @ right):
        raise Unhealthy("a matrix product is wrong")
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < min_free_fraction * total:
        raise Unhealthy(
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB free, {min_free_fraction:.0%} required"
        )
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return
    problem = driver_problem(nvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    if problem:
        raise Unhealthy(problem)


def driver_problem(nvml: Any, uuid: str) -> str | None:
    """Return the problem that the driver's library NVML (pynvml) reports for a GPU, or None."""

    def ask(question: str, *arguments: Any) -> Any:
        """Return the answer, or None if this kind of GPU does not support the question."""
        try:
            return getattr(nvml, question)(*arguments)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
            return None

    try:
        nvml.nvmlInit()
        # By UUID: the indices of NVML are not those of CUDA_VISIBLE_DEVICES.
        gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
        uncorrected = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
        errors = ask("nvmlDeviceGetTotalEccErrors", gpu, *uncorrected)
        retiring = ask("nvmlDeviceGetRetiredPagesPendingStatus", gpu)
        # Numbers of corrected and uncorrected rows, whether one is pending, whether one failed.
        remapped = ask("nvmlDeviceGetRemappedRows", gpu) or (0, 0, 0, 0)
    except nvml.NVMLError as error:
        return f"the driver does not answer ({error})"
    if errors:
        return f"{errors} uncorrected memory errors since the driver was loaded"
    if retiring:
        return "memory pages are pending retirement; the GPU needs a reset"
    if remapped[3]:
        return "the remapping of a memory row failed; the GPU needs a repair"
    if remapped[2]:
        return "memory rows are pending remapping; the GPU needs a reset"
    return None
