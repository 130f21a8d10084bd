"""Starts that a library turns into one process, or into copies that never meet; all are refused.

Under a script that does not ask, each ends with exit code 0 and plausible losses.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.ranks import Forked, Ranks
from tests.shared import free_port

# Launchers that a user might take, forked where their imports are done.
ACCELERATE = "accelerate.commands.launch"
TORCHRUN = "torch.distributed.run"
TRAIN = ["-m", "train.tinyllama", "--dry_run", "--run_folder"]

MULTI_CPU = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
num_processes: 2
use_cpu: true
"""


def start(*words: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as a user would from the checkout."""
    with Forked(*words, environment=environment) as process:
        return process.end()


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the error that a start ended with; every process of it says the same."""
    assert done.returncode != 0, done.stdout
    said = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert len(said) == 1, done.stderr
    return said.pop()


def nothing_was_trained(run_folder: Path) -> bool:
    """Return whether a run folder holds no result."""
    return not [path for path in run_folder.rglob("*") if path.name != "run.lock"]


@pytest.mark.computes(1)
@pytest.mark.parametrize("how", ["--cpu", "MULTI_CPU"])
def test_a_launcher_that_makes_one_process_of_two_is_refused(
    clean_environment: dict[str, str], tmp_path: Path, how: str
) -> None:
    options = ["--cpu", "--num_processes", "2"]
    if how == "MULTI_CPU":
        (tmp_path / "multi_cpu.yaml").write_text(MULTI_CPU)
        options = ["--config_file", str(tmp_path / "multi_cpu.yaml")]
    run = tmp_path / "run"
    error = the_error(start(ACCELERATE, *options, *TRAIN, str(run), environment=clean_environment))
    assert "accelerate launch started one process" in error
    assert "--cpu or MULTI_CPU whatever --num_processes says" in error
    assert "launch with a file from configs/accelerate" in error
    assert nothing_was_trained(run)


@pytest.mark.computes(2)
def test_multi_gpu_without_gpus_is_refused(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    words = [*options, *TRAIN, str(tmp_path)]
    error = the_error(start(ACCELERATE, *words, environment=clean_environment))
    assert "the launcher asked for GPUs but torch sees none" in error
    assert "set SLUICE_DEVICE=cpu to train on the CPU, or check nvidia-smi" in error
    assert nothing_was_trained(tmp_path)


@pytest.mark.computes(2)
def test_torchrun_without_a_strategy_is_refused(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    options = ["--nproc_per_node", "2", "--master_port", str(free_port())]
    words = [*options, *TRAIN, str(tmp_path)]
    error = the_error(start(TORCHRUN, *words, environment=clean_environment))
    assert "2 processes but no strategy" in error
    assert "--config_file configs/accelerate/ddp.yaml`, not with torchrun" in error
    assert nothing_was_trained(tmp_path)


@pytest.mark.computes(2)
def test_deepspeed_together_with_accelerate_use_cpu_is_refused(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    options = ["--config_file", "configs/accelerate/zero2.yaml", "--num_machines", "1"]
    options += ["--num_processes", "2", "--main_process_port", str(free_port())]
    environment = clean_environment | {"ACCELERATE_USE_CPU": "true"}
    words = [*options, *TRAIN, str(tmp_path)]
    error = the_error(start(ACCELERATE, *words, environment=environment))
    assert "ACCELERATE_USE_CPU is set together with DeepSpeed" in error
    assert "plain DDP; unset it and set SLUICE_DEVICE=cpu" in error
    assert nothing_was_trained(tmp_path)


def test_a_model_that_accelerate_left_bare_is_refused(clean_environment: dict[str, str]) -> None:
    with Ranks(
        "ddp", 2, "tests.real.train.worker_bare_model", environment=clean_environment
    ) as processes:
        ended = processes.end()
    for done in ended:
        assert "the trap is there" in done.stdout, done.stderr
        assert the_error(done) == (
            "error: 2 processes, but the model is a bare Linear: gradients would not be "
            "synchronised; launch with a file from configs/accelerate"
        )
        assert done.returncode == 2
        assert "not refused" not in done.stdout


def test_fewer_processes_than_promised_are_refused(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    environment = clean_environment | {"SLUICE_WORLD_SIZE": "2"}
    done = start(*TRAIN[1:], str(tmp_path), environment=environment)
    error = the_error(done)
    assert "SLUICE_WORLD_SIZE is 2 but the launcher's WORLD_SIZE is 1" in error
    assert "start the run with `make run` or slurm/node.sh" in error
    assert done.returncode == 2
    assert nothing_was_trained(tmp_path)


def test_ranks_that_start_from_different_weights_are_refused(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    # Another seed on each, as with a script that an edit reached on one node only.
    seeds = {rank: ["--seed", str(rank)] for rank in (0, 1)}
    words = [*TRAIN[1:], str(tmp_path)]
    with Ranks("ddp", 2, *words, environment=clean_environment, words_of_rank=seeds) as processes:
        ended = processes.end()
    for done in ended:
        assert the_error(done) == (
            "error: the processes start from different weights; they need the same seed and "
            "model folder"
        )
        assert done.returncode == 2
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not list(tmp_path.glob("checkpoints/*"))
