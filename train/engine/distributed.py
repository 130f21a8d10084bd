"""The process group of a run: nccl with GPUs, gloo without, also for one process."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from runfolder.errors import UserError


def init_distributed(timeout_s: int = 600) -> torch.device:
    """Join the processes that the launcher started, and return this one's device.

    The device is set before the process group exists, because NCCL otherwise guesses it from the
    rank. A collective that takes longer than `timeout_s` ends the run: a cut link sends no reset.

    Raises:
        UserError: the launcher started something else than it promised.
    """
    check_promises()
    if torch.cuda.is_available() and not _cpu_was_asked():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{os.environ.get('LOCAL_WORLD_SIZE')} processes on this node but "
                f"{torch.cuda.device_count()} GPUs; start one process for each GPU (GPUS=)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(
            backend, timeout=timeout, device_id=device if backend == "nccl" else None
        )
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    return device


def check_promises() -> None:
    """Reject launches that would train on one process, or separate copies of the run.

    Each was seen to exit 0 with plausible losses under a script that does not check.

    Raises:
        UserError: the launcher started something else than it promised.
    """
    environment = os.environ
    world_size = int(environment.get("WORLD_SIZE", "1"))
    promised = environment.get("SLUICE_WORLD_SIZE")
    if promised is not None and int(promised) != world_size:
        raise UserError(
            f"SLUICE_WORLD_SIZE is {promised} but the launcher's WORLD_SIZE is {world_size}; "
            "start the run with `make run` or slurm/node.sh"
        )
    launched_by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if promised is None and launched_by_accelerate and "WORLD_SIZE" not in environment:
        raise UserError(
            "accelerate launch started one process without a rank, as it does with --cpu or "
            "MULTI_CPU whatever --num_processes says; launch with a file from configs/accelerate"
        )
    if "WORLD_SIZE" in environment and not launched_by_accelerate and world_size > 1:
        raise UserError(
            f"{world_size} processes but no strategy; start them with `accelerate launch "
            "--config_file configs/accelerate/ddp.yaml`, not with torchrun"
        )
    use_cpu = truth("ACCELERATE_USE_CPU")
    if use_cpu and truth("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "ACCELERATE_USE_CPU is set together with DeepSpeed, which accelerate takes to mean "
            "plain DDP; unset it and set SLUICE_DEVICE=cpu"
        )
    expects_gpus = environment.get("SLUICE_DEVICE") == "cuda" or (
        launched_by_accelerate and world_size > 1 and not _cpu_was_asked()
    )
    if expects_gpus and not torch.cuda.is_available():
        raise UserError(
            "the launcher asked for GPUs but torch sees none; set SLUICE_DEVICE=cpu to train "
            "on the CPU, or check nvidia-smi on this node"
        )


def _cpu_was_asked() -> bool:
    return os.environ.get("SLUICE_DEVICE") == "cpu" or truth("ACCELERATE_USE_CPU")


def truth(variable: str) -> bool:
    """Return whether an environment variable of the launcher is true."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def rank() -> int:
    """Return this process's number among all processes of the run; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes of the run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this process is the one that prints and publishes."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has reached this point."""
    if dist.is_initialized():
        dist.barrier()


def agree(*values: float, device: torch.device) -> list[float]:
    """Return the sums over all processes of a few numbers, in one all-reduce.

    fp64, so that the result does not depend on the magnitude of the others; the order of the
    summands is the process group's.
    """
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def from_main_process(text: str | None) -> str | None:
    """Return on every process the string that the main process passed."""
    box = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_strings(text: str) -> list[str]:
    """Return the strings of all processes, by rank, on every process."""
    if not dist.is_initialized():
        return [text]
    boxes: list[str] = [""] * world_size()
    dist.all_gather_object(boxes, text)
    return boxes
