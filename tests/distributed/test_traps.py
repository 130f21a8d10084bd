"""Starts that a library turns into one process, or into copies that never meet; all are refused.

Under a script that does not ask, each ends with exit code 0 and plausible losses.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT, LAUNCH_TIMEOUT_S, free_port

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = ["-m", "train.tinyllama", "--dry_run", "--run_folder"]

MULTI_CPU = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
num_processes: 2
use_cpu: true
"""


def start(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as a user would from the checkout."""
    return subprocess.run(
        command,
        check=False,
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LAUNCH_TIMEOUT_S,
    )


def start_two(
    environment: dict[str, str], *commands: list[str]
) -> list[subprocess.CompletedProcess[str]]:
    """Run one command as rank 0 and one as rank 1 of a group, without a launcher."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env=environment | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    ended = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=LAUNCH_TIMEOUT_S)
            ended.append(
                subprocess.CompletedProcess(process.args, process.returncode, output, errors)
            )
    finally:
        for process in processes:
            process.kill()
    return ended


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the error that a start ended with; every process of it says the same."""
    assert done.returncode != 0, done.stdout
    said = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert len(said) == 1, done.stderr
    return said.pop()


def nothing_was_trained(run_folder: Path) -> bool:
    """Return whether a run folder holds no result."""
    return not [path for path in run_folder.rglob("*") if path.name != "run.lock"]


@pytest.mark.parametrize("how", ["--cpu", "MULTI_CPU"])
def test_a_launcher_that_makes_one_process_of_two_is_refused(
    clean_environment: dict[str, str], tmp_path: Path, how: str
) -> None:
    options = ["--cpu", "--num_processes", "2"]
    if how == "MULTI_CPU":
        (tmp_path / "multi_cpu.yaml").write_text(MULTI_CPU)
        options = ["--config_file", str(tmp_path / "multi_cpu.yaml")]
    run = tmp_path / "run"
    error = the_error(start([*ACCELERATE, *options, *TRAIN, str(run)], clean_environment))
    assert "accelerate launch started one process" in error
    assert "--cpu or MULTI_CPU whatever --num_processes says" in error
    assert "launch with a file of configs/accelerate" in error
    assert nothing_was_trained(run)


def test_multi_gpu_without_gpus_is_refused(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    done = start([*ACCELERATE, *options, *TRAIN, str(tmp_path)], clean_environment)
    error = the_error(done)
    assert "the launcher asked for GPUs but torch sees none" in error
    assert "set SLUICE_DEVICE=cpu to train on the CPU, or look at nvidia-smi" in error
    assert nothing_was_trained(tmp_path)


def test_torchrun_without_a_strategy_is_refused(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    options = ["--nproc_per_node", "2", "--master_port", str(free_port())]
    error = the_error(start([*TORCHRUN, *options, *TRAIN, str(tmp_path)], clean_environment))
    assert "2 processes but no strategy" in error
    assert "--config_file configs/accelerate/ddp.yaml`, not with torchrun" in error
    assert nothing_was_trained(tmp_path)


def test_deepspeed_together_with_accelerate_use_cpu_is_refused(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    options = ["--config_file", "configs/accelerate/zero2.yaml", "--num_machines", "1"]
    options += ["--num_processes", "2", "--main_process_port", str(free_port())]
    environment = clean_environment | {"ACCELERATE_USE_CPU": "true"}
    error = the_error(start([*ACCELERATE, *options, *TRAIN, str(tmp_path)], environment))
    assert "ACCELERATE_USE_CPU is set together with DeepSpeed" in error
    assert "plain DDP; unset it and set SLUICE_DEVICE=cpu" in error
    assert nothing_was_trained(tmp_path)


def test_a_model_that_accelerate_left_bare_is_refused(clean_environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tests.distributed.worker_bare_model"]
    for done in start_two(clean_environment, command, command):
        assert "the trap is there" in done.stdout, done.stderr
        assert the_error(done) == (
            "error: 2 processes, but the model is a bare Linear: gradients would not be "
            "synchronised; launch with a file of configs/accelerate"
        )
        assert done.returncode == 2
        assert "not refused" not in done.stdout


def test_fewer_processes_than_promised_are_refused(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    environment = clean_environment | {"SLUICE_WORLD_SIZE": "2"}
    done = start([sys.executable, *TRAIN, str(tmp_path)], environment)
    error = the_error(done)
    assert "2 processes were promised but the launcher made a world of 1" in error
    assert "start the run with `make run` or slurm/node.sh" in error
    assert done.returncode == 2
    assert nothing_was_trained(tmp_path)


def test_ranks_that_start_from_different_weights_are_refused(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    # Another seed on each, as with a script that an edit reached on one node only.
    environment = clean_environment | {"SLUICE_WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}
    environment["SLUICE_DEVICE"] = "cpu"
    command = [sys.executable, *TRAIN, str(tmp_path), "--seed"]
    for done in start_two(environment, [*command, "1"], [*command, "2"]):
        assert the_error(done) == (
            "error: the processes start from different weights; they need the same seed and "
            "model folder"
        )
        assert done.returncode == 2
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not list(tmp_path.glob("checkpoints/*"))
