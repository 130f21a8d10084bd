"""The launcher of a node, slurm/launch.py: what it gives to its processes, signals, exit codes.

The launcher is real, and forked like the ranks of other tests (tests/ranks.py) to spare its
imports; its processes are real. That `make` starts it is tested in test_make.py.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from runfolder import attempts
from runfolder.checkpoints import published
from tests.conftest import losses
from tests.ranks import STRATEGIES, Forked, Ranks
from tests.real.train.test_faults import SETTINGS
from tests.shared import free_port
from tests.waiting import state_of, wait_until


def launcher(
    accel: str,
    num_processes: int,
    module: str,
    *words: str,
    environment: dict[str, str],
    node: tuple[int, int] = (0, 1),
    port: int = 0,
    device: str = "cpu",
) -> Forked:
    """Start a launcher, as slurm/node.sh does; `node`: its number, and how many there are."""
    number, num_nodes = map(str, node)
    options = ["--num_machines", num_nodes, "--machine_rank", number, "--rdzv_backend", "static"]
    options += ["--config_file", f"configs/accelerate/{accel}.yaml", "--num_processes"]
    options += [str(num_processes), "--main_process_port", str(port or free_port())]
    options += ["--main_process_ip", "127.0.0.1"]
    own = {"SLUICE_WORLD_SIZE": str(num_processes), "SLUICE_DEVICE": device}
    # As slurm/environment.sh has it; long, because a machine may be busy.
    own["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    own["PET_SHUTDOWN_TIMEOUT"] = "600"
    return Forked(
        *("slurm.launch", *options, "--module", "train.rider", module, *words),
        environment=environment | own,
    )


def end_with(
    folder: Path,
    *codes: str,
    environment: dict[str, str],
    accel: str = "ddp",
    device: str = "cpu",
) -> tuple[int, list[dict[str, Any]]]:
    """Launch processes that end with `codes`; return the launcher's, and what they left."""
    words = ["tests.real.train.worker_launched", str(folder), *codes]
    with launcher(accel, len(codes), *words, environment=environment, device=device) as process:
        done = process.end()
    files = [folder / f"rank-{number}.json" for number in range(len(codes))]
    return done.returncode, [json.loads(file.read_text()) for file in files]


# ---- what its processes find ----


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("accel", STRATEGIES)
def test_each_strategys_file_makes_the_variables_by_which_the_tests_fork_ranks(
    clean_environment: dict[str, str], tmp_path: Path, accel: str, num_processes: int
) -> None:
    codes = ["0"] * num_processes
    code, left = end_with(tmp_path, *codes, environment=clean_environment, accel=accel)
    assert code == 0
    forked = Ranks.variables(accel, num_processes)
    for number, launched in enumerate(left):
        environment = launched["environment"]
        for name, value in (forked | Ranks.numbers(number)).items():
            if name != "MASTER_PORT":
                assert environment[name] == value, name
        # Nor does it ask for another strategy besides.
        asked = {name for name in environment if name.startswith("ACCELERATE_USE_")}
        assert asked == {name for name in forked if name.startswith("ACCELERATE_USE_")}
    assert len({launched["environment"]["MASTER_PORT"] for launched in left}) == 1


def test_a_process_that_is_forked_finds_what_one_that_is_started_does(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    # With GPUs they are started: what has touched CUDA must not be forked.
    left = {}
    for device in ("cpu", "cuda"):
        _, left[device] = end_with(tmp_path, "0", "0", environment=clean_environment, device=device)
    for forked, started in zip(*left.values(), strict=True):
        own = {"MASTER_PORT", "SLUICE_DEVICE", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID"}
        for found in (forked, started):
            found["environment"] = {
                name: value for name, value in found["environment"].items() if name not in own
            }
            del found["pid"]
        assert forked.pop("name") == f"rank {forked['environment']['RANK']}"
        del started["name"]
        assert forked == started


# ---- how it ends ----


@pytest.mark.parametrize(
    ("codes", "in_a_step", "expected"),
    [
        (("0", "0"), False, 0),
        (("75", "75"), False, 75),
        # In a step of Slurm's any other code would end the processes of the other nodes.
        (("75", "75"), True, 0),
        (("2", "2"), True, 2),
        (("1", "1"), False, 1),
        # The other rank is ended, and what the shells say of a killed process is said.
        (("wait", "-9"), False, 128 + 9),
    ],
)
def test_the_exit_code_is_that_of_the_processes(
    clean_environment: dict[str, str],
    tmp_path: Path,
    codes: tuple[str, str],
    in_a_step: bool,
    expected: int,
) -> None:
    environment = clean_environment | ({"SLUICE_STEP": "1"} if in_a_step else {})
    run = tmp_path / "run"
    environment |= {"SLUICE_RUN_FOLDER": str(run), "SLUICE_ATTEMPT": "3"}
    code, left = end_with(tmp_path, *codes, environment=environment)
    assert code == expected
    # Of a refusal the batch script would not hear for sure: srun tells of the node that it kills.
    told = attempts.read(run, 3).outcome or {}
    assert told.get("exit_code") == (2 if expected == 2 and in_a_step else None)
    assert not any(Path(f"/proc/{launched['pid']}").exists() for launched in left)


def test_a_node_does_not_wait_for_one_that_alone_was_asked_to_end(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    (run / "attempts/1").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"program": {"signal": "USR1", "checkpoints": "x"}}))
    words = ("tests.real.train.worker_launched", str(tmp_path), "wait", "wait")
    environment = clean_environment | {"SLUICE_RUN_FOLDER": str(run), "SLUICE_STEP": "1"}

    def node(number: int) -> Forked:
        own = environment | {"SLUICE_NODE_RANK": str(number)}
        return launcher("ddp", 2, *words, environment=own, node=(number, 2), port=port)

    with node(0) as first, node(1) as second:
        files = [tmp_path / f"rank-{number}.json" for number in (0, 1)]
        wait_until(lambda: all(file.exists() for file in files), "the processes are there")
        os.kill(second.pid, signal.SIGTERM)
        assert (second.end().returncode, first.end().returncode) == (0, 0)
    outcome = attempts.read(run, 1).outcome or {}
    assert (outcome["outcome"], outcome["reason"]) == ("stopped", "SIGTERM")


def test_processes_do_not_outlive_a_launcher_that_is_killed(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    words = ("tests.real.train.worker_launched", str(tmp_path), "wait", "wait")
    with launcher("ddp", 2, *words, environment=clean_environment) as process:
        files = [tmp_path / f"rank-{number}.json" for number in (0, 1)]
        wait_until(lambda: all(file.exists() for file in files), "the processes are there")
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    # They are in sessions of their own.
    pids = [json.loads(file.read_text())["pid"] for file in files]
    wait_until(lambda: {state_of(pid) for pid in pids} <= {"", "Z"}, "they are gone")


# Ctrl+C: test_make.py, through make.
@pytest.mark.computes(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_it_saves_and_asks_to_be_run_again(
    clean_environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    words = [*SETTINGS, "--checkpoint.every_steps", "100000", "--max_steps", "100000"]
    environment = clean_environment | {"SLUICE_RUN_FOLDER": str(tmp_path)}
    with launcher("ddp", 2, "train.tinyllama", *words, environment=environment) as process:
        process.wait_for("step     12 ")
        os.kill(process.pid, number)
        done = process.end()
    assert done.returncode == 75, done.stderr
    outcome = json.loads((tmp_path / "attempts/1/outcome.json").read_text())
    assert (outcome["outcome"], outcome["reason"]) == ("stopped", number.name)
    # Saved at the step that the signal found it in, not at the interval.
    assert outcome["step"] == max(losses(tmp_path)) >= 12
    assert [path.name for path in published(tmp_path / "checkpoints")] == [
        f"step-{outcome['step']:08d}"
    ]
