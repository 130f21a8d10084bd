"""What clusters do to a run: kills, signals, full disks, damaged files. The proof is the curve."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT, LAUNCH_TIMEOUT_S, Launch, launch_command, losses, read_metrics
from tests.distributed import alone
from train.engine.checkpoint import find_damage, step_folders

pytestmark = pytest.mark.timeout(900)
# A step takes some 20 ms, so that a checkpoint is being written most of the time.
SETTINGS = [
    *("--model.preset", "tiny", "--data.sequence_length", "64"),
    *("--data.train", "train/samples/train.txt"),
    *("--data.validation", "train/samples/validation.txt"),
    *("--batch.global_batch_size", "4", "--batch.micro_batch_size", "2", "--optimizer.lr", "3e-3"),
    *("--schedule.kind", "constant", "--schedule.warmup_steps", "4", "--export", "false"),
    *("--log_every_steps", "1", "--checkpoint.every_steps", "1", "--checkpoint.keep", "2"),
    *("--evaluation.every_steps", "50", "--evaluation.max_tokens", "512"),
]


def settings_for(run_folder: Path, *more: str) -> list[str]:
    """Return the words for train/tinyllama.py."""
    return ["--run_folder", str(run_folder), *SETTINGS, *more]


@pytest.fixture
def train(
    clean_environment: dict[str, str], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that trains in one process to the end."""

    def run(run_folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
        words = settings_for(run_folder, *more)
        return alone.train(words, clean_environment, tmp_path / "stderr")

    return run


Train = Callable[..., subprocess.CompletedProcess[str]]


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read the process's output until a line that holds `text`."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"'{text}' never came: {''.join(seen)}")


# ---- kills ----


def test_killed_at_20_random_moments_the_curve_equals_the_uninterrupted_one(
    train: Train, clean_environment: dict[str, str], tmp_path: Path
) -> None:
    max_steps = ("--max_steps", "400")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train(straight, *max_steps, "--checkpoint.every_steps", "100").returncode == 0
    moments = random.Random(2026)
    killed_inside_a_save = 0
    for number in range(20):
        asynchronous = ("--checkpoint.asynchronous", "true" if number % 2 else "false")
        words = settings_for(killed, *max_steps, *asynchronous)
        with alone.Alone(words, clean_environment) as process:
            # By then the first time, too, a checkpoint was published.
            process.wait_for("resuming from" if number else "step      3 ")
            time.sleep(moments.uniform(0.0, 0.6))
            os.kill(process.pid, signal.SIGKILL)
            assert process.end()[0] == -signal.SIGKILL
        killed_inside_a_save += any((killed / "checkpoints").glob(".step-*"))
        found = step_folders(killed / "checkpoints")
        assert found, "a checkpoint was lost"
        assert [find_damage(folder) for folder in found] == [None] * len(found)
    assert killed_inside_a_save >= 3
    done = train(killed, *max_steps)
    assert done.returncode == 0, done.stderr
    assert losses(killed) == losses(straight)
    assert len(losses(killed)) == 400


def test_two_processes_killed_with_their_launcher_resume_exactly(
    launch: Launch, clean_environment: dict[str, str], tmp_path: Path
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    settings = [*SETTINGS, "--max_steps", "60", "--run_folder"]
    assert launch("zero2", 2, "train.tinyllama", *settings, str(straight)).returncode == 0
    with subprocess.Popen(
        launch_command("zero2", 2, "train.tinyllama", *settings, str(killed)),
        cwd=CHECKOUT,
        env=clean_environment | {"SLUICE_WORLD_SIZE": "2", "SLUICE_DEVICE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        wait_for(process, "step     12 ")
        os.kill(process.pid, signal.SIGKILL)
    # The processes are not the launcher's group; they must not outlive it all the same.
    done = launch("zero2", 2, "train.tinyllama", *settings, str(killed))
    assert done.returncode == 0, done.stderr
    (resumed,) = [line for line in done.stdout.splitlines() if line.startswith("resuming from")]
    assert 10 <= int(resumed.rpartition(" ")[2]) < 40, "the killed run trained on"
    assert losses(killed) == losses(straight)


@pytest.mark.needs("pgrep")
def test_a_killed_rank_ends_the_run_at_once_with_one_line_from_the_other(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    with subprocess.Popen(
        launch_command("ddp", 2, "train.tinyllama", *SETTINGS, "--run_folder", str(tmp_path)),
        cwd=CHECKOUT,
        env=clean_environment | {"SLUICE_WORLD_SIZE": "2", "SLUICE_DEVICE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(process, "step     12 ")
        workers = subprocess.run(
            ["pgrep", "-P", str(process.pid)], check=True, capture_output=True, text=True
        )
        victim = max(int(pid) for pid in workers.stdout.split())
        started = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode not in (0, 75)
    assert "lost contact with another process" in errors
    assert "Traceback" not in errors


# ---- requests to stop ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_and_asks_to_be_run_again(
    launch: Launch, clean_environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    settings = [*SETTINGS, "--checkpoint.every_steps", "1000", "--run_folder", str(tmp_path)]
    environment = clean_environment | {
        "SLUICE_WORLD_SIZE": "2",
        "SLUICE_DEVICE": "cpu",
        "SLUICE_RUN_FOLDER": str(tmp_path),
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    }
    with subprocess.Popen(
        launch_command("ddp", 2, "train.tinyllama", *settings, "--max_steps", "100000"),
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(process, "step     12 ")
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 75
    outcome = json.loads((tmp_path / "attempts/1/outcome.json").read_text())
    assert (outcome["outcome"], outcome["reason"]) == ("stopped", number.name)
    # Saved at the step that the signal found it in, not at the interval.
    assert outcome["step"] == max(losses(tmp_path)) >= 12
    assert [path.name for path in step_folders(tmp_path / "checkpoints")] == [
        f"step-{outcome['step']:08d}"
    ]
    if number != signal.SIGUSR1:
        return  # What comes after is the same: the checkpoint does not know what asked for it.
    ended = ("--max_steps", str(outcome["step"] + 3))
    done = launch("ddp", 2, "train.tinyllama", *settings, *ended)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path)) == list(range(1, outcome["step"] + 4))


def test_a_signal_during_evaluation_saves_and_the_evaluation_is_made_up_for(
    train: Train, clean_environment: dict[str, str], tmp_path: Path
) -> None:
    # One sequence a batch and all of a long validation text: the evaluation takes seconds.
    long_text = tmp_path / "long.txt"
    long_text.write_text(Path(CHECKOUT / "train/samples/train.txt").read_text() * 30)
    settings = [
        *("--data.validation", str(long_text), "--evaluation.every_steps", "2"),
        *("--evaluation.max_tokens", "null", "--batch.micro_batch_size", "1"),
    ]
    words = settings_for(tmp_path / "run", *settings, "--max_steps", "3")
    with alone.Alone(words, clean_environment) as process:
        process.wait_for("step      1 ")
        time.sleep(1.0)  # now in the evaluation of step 2
        os.kill(process.pid, signal.SIGTERM)
        code, output = process.end()
    assert code == 75, output
    assert "stopped by SIGTERM at step 2" in output
    assert "validation_loss" not in read_metrics(tmp_path / "run")[2]
    assert train(tmp_path / "run", *settings, "--max_steps", "3").returncode == 0
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "loss" in lines[2] and "validation_loss" in lines[2]


# ---- damage ----


def flip_a_byte(folder: Path) -> None:
    shard = next(folder.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def truncate(folder: Path) -> None:
    shard = next(folder.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-100])


def remove_a_file(folder: Path) -> None:
    next(folder.glob("shard-*")).unlink()


def remove_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def spoil_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def empty_the_folder(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.fixture(scope="module")
def a_run(
    tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> tuple[Path, Path]:
    """Return a run of 6 steps, with a checkpoint at 5 and 6, and one of 8 steps."""
    folder = tmp_path_factory.mktemp("runs")
    for name, max_steps in (("six", "6"), ("eight", "8")):
        words = settings_for(folder / name, "--max_steps", max_steps)
        done = alone.train(words, clean_environment, folder / "stderr")
        assert done.returncode == 0, done.stderr
    return folder / "six", folder / "eight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte, "another sha256"),
        (truncate, "bytes instead of"),
        (remove_a_file, "is missing"),
        (remove_the_manifest, "manifest.json is missing"),
        (spoil_the_manifest, "manifest.json cannot be read"),
        (empty_the_folder, "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_said_and_the_one_before_serves(
    train: Train,
    a_run: tuple[Path, Path],
    tmp_path: Path,
    damage: Callable[[Path], None],
    words: str,
) -> None:
    run = shutil.copytree(a_run[0], tmp_path / "run")
    damage(run / "checkpoints/step-00000006")
    done = train(run, "--max_steps", "8")
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stdout.splitlines() if "is damaged" in line]
    assert said.startswith("checkpoint step-00000006 is damaged (") and words in said
    assert "resuming from step-00000005, step 5" in done.stdout
    assert losses(run) == losses(a_run[1])
    assert (run / "checkpoints/step-00000006.damaged").is_dir()


def test_with_all_checkpoints_damaged_the_run_does_not_start_from_scratch(
    train: Train, a_run: tuple[Path, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(a_run[0], tmp_path / "run")
    for folder in step_folders(run / "checkpoints"):
        flip_a_byte(folder)
    done = train(run, "--max_steps", "8")
    assert done.returncode == 1
    assert "none of the 2 checkpoints is complete" in done.stderr
    assert losses(run) == losses(a_run[0])


# ---- no room, no right ----


@pytest.mark.needs("unshare")
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_is_one_error_and_the_earlier_checkpoints_stay(
    clean_environment: dict[str, str], tmp_path: Path, asynchronous: str
) -> None:
    # A file system of its own that holds one checkpoint of 1.9 MB and not a second.
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = ["--max_steps", "20", "--checkpoint.asynchronous", asynchronous]
    command = [sys.executable, "-m", "train.tinyllama"]
    command += settings_for(disk / "run", *settings, "--checkpoint.every_steps", "5")
    copy = tmp_path / "copy"
    inside = 'mount -t tmpfs -o size=3m none "$1"; shift; disk=$1; copy=$2; shift 2; "$@"; '
    inside += 'code=$?; cp -a "$disk/run" "$copy"; exit $code'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inside, "sh", disk, disk, copy, *command],
        check=False,
        cwd=CHECKOUT,
        env=clean_environment,
        capture_output=True,
        text=True,
        timeout=LAUNCH_TIMEOUT_S,
    )
    assert done.returncode == 1, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert error.startswith("error: ")
    assert "checkpoint 10 could not be written" in error
    assert "No space left on device" in error
    assert "step-00000005 is complete" in error
    assert "Traceback" not in done.stderr
    assert [path.name for path in (copy / "checkpoints").iterdir() if path.is_dir()] == [
        "step-00000005"
    ]
    assert find_damage(copy / "checkpoints/step-00000005") is None


def test_a_second_run_on_the_same_folder_is_refused(
    train: Train, clean_environment: dict[str, str], tmp_path: Path
) -> None:
    words = settings_for(tmp_path, "--max_steps", "100000")
    with alone.Alone(words, clean_environment) as first:
        first.wait_for("step      3 ")
        second = train(tmp_path, "--max_steps", "100000")
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert "another run works on it (process " + str(first.pid) in line
    assert train(tmp_path, "--max_steps", "1").returncode == 0, "the lock outlived its holder"


# ---- numbers that are not finite ----


def test_a_loss_that_is_not_finite_ends_the_run_and_says_where(
    launch: Launch, tmp_path: Path
) -> None:
    settings = [*SETTINGS, "--optimizer.lr", "1e25", "--schedule.warmup_steps", "0"]
    settings += ["--max_steps", "20", "--run_folder", str(tmp_path)]
    # Under the other strategies: test_trajectories.
    done = launch("ddp", 2, "train.tinyllama", *settings)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "is not finite (rank 0, positions " in done.stderr
    assert "Traceback" not in done.stderr
    # What diverged was not trained on: every line that was logged is finite.
    assert all(line["loss"] < 1e30 for line in read_metrics(tmp_path)[1:])


# ---- another model ----


def test_a_checkpoint_of_another_architecture_is_refused(
    train: Train, a_run: tuple[Path, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(a_run[0], tmp_path / "run")
    config = json.loads((run / "checkpoints/step-00000006/config.json").read_text())
    assert config["hidden_size"] == 64
    done = train(run, "--max_steps", "8", "--model.preset", "15m")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "is of another model: vocab_size is 512 there and 32000 here" in line


def test_other_data_is_refused(train: Train, a_run: tuple[Path, Path], tmp_path: Path) -> None:
    run = shutil.copytree(a_run[0], tmp_path / "run")
    done = train(run, "--max_steps", "8", "--seed", "43")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "was made with seed 42, not 43" in line
