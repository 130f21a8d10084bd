"""What clusters do to a run: kills, signals, full disks, damaged files. The proof is the curve."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from runfolder import checkpoints
from tests import ranks, waiting
from tests.conftest import losses, read_metrics
from tests.moments import Pause
from tests.ranks import Forked, Ranks
from tests.shared import CHECKOUT
from train.engine.checkpoint_reader import find_damage

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


Start = Callable[..., Forked]
Train = Callable[..., CompletedProcess[str]]


@pytest.fixture
def start(clean_environment: dict[str, str]) -> Start:
    """Return a function that starts a training of one process without a launcher."""

    def begin(run_folder: Path, *more: str, pause: Pause | None = None) -> Forked:
        environment = clean_environment | (pause.variable if pause else {})
        words = settings_for(run_folder, *more)
        return Forked("train.tinyllama", *words, environment=environment)

    return begin


@pytest.fixture
def train(start: Start) -> Train:
    """Return a function that trains in one process to the end."""

    def run(run_folder: Path, *more: str) -> CompletedProcess[str]:
        with start(run_folder, *more) as process:
            return process.end()

    return run


def published(run_folder: Path) -> list[int]:
    """Return the steps of the published checkpoints, the newest first; all of them are whole."""
    found = checkpoints.published(run_folder / "checkpoints")
    assert [find_damage(folder) for folder in found] == [None] * len(found)
    return [checkpoints.step_of(folder) for folder in found]


def latest(run_folder: Path) -> int:
    return int((run_folder / "checkpoints/latest").read_text()[5:])


def hidden(run_folder: Path, step: int) -> set[str] | None:
    """Return the files of a checkpoint that is not published, None if there is no such folder."""
    folder = run_folder / f"checkpoints/.step-{step:08d}"
    return {path.name for path in folder.iterdir()} if folder.exists() else None


# ---- kills ----

SHARD, REST = (
    {"shard-00000-of-00001.safetensors"},
    {"config.json", "generation_config.json", "state.json"},
)
# A moment, and what is there when the checkpoint of step N is made in it, with N - 1 and N - 2
# before it: the hidden files, the published steps and what `latest` names, as numbers before N.
KILLS: list[tuple[str, set[str] | None, list[int], int]] = [
    ("in-shard", SHARD, [1, 2], 1),
    ("before-manifest", SHARD | REST, [1, 2], 1),
    ("before-rename", SHARD | REST | {"manifest.json"}, [1, 2], 1),
    ("before-latest", None, [0, 1, 2], 1),
    ("after-latest", None, [0, 1, 2], 0),
]


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> dict[int, float]:
    """Return the losses of 26 steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    words = settings_for(folder, "--max_steps", "26", "--checkpoint.every_steps", "100")
    with Forked("train.tinyllama", *words, environment=clean_environment) as process:
        assert process.end().returncode == 0
    return losses(folder)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_killed_at_every_moment_of_a_save_the_curve_equals_the_uninterrupted_one(
    start: Start, train: Train, straight: dict[int, float], tmp_path: Path, asynchronous: str
) -> None:
    run, words = tmp_path / "run", ("--max_steps", "26", "--checkpoint.asynchronous", asynchronous)
    step = 0
    for moment, files, before, newest in KILLS:
        # Each attempt makes three checkpoints, and is killed in the fourth.
        pause = Pause(tmp_path, moment, time=4)
        with start(run, *words, pause=pause) as process:
            pid = pause.wait(process.is_alive)
            assert pid == process.pid
            step += 4
            assert hidden(run, step) == files, moment
            assert published(run) == [step - number for number in before], moment
            assert latest(run) == step - newest, moment
            os.kill(pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        step = published(run)[0]
    done = train(run, *words)
    assert done.returncode == 0, done.stderr
    assert f"resuming from step-{step:08d}, step {step}\n" in done.stdout
    assert losses(run) == straight
    assert published(run) == [26, 25]
    assert not list((run / "checkpoints").glob(".*"))


# 512 tokens are 4 batches: the ninth is in the third evaluation, that of step 10.
@pytest.mark.parametrize(
    ("moment", "time", "saved"), [("after-step", 8, 6), ("in-evaluation", 9, 9)]
)
def test_killed_elsewhere_it_goes_on_from_the_last_interval(
    start: Start,
    train: Train,
    straight: dict[int, float],
    tmp_path: Path,
    moment: str,
    time: int,
    saved: int,
) -> None:
    words = ["--max_steps", "26", "--evaluation.every_steps", "5", "--checkpoint.every_steps", "3"]
    words += ["--checkpoint.asynchronous", "false"]
    pause = Pause(tmp_path, moment, time)
    with start(tmp_path / "run", *words, pause=pause) as process:
        os.kill(pause.wait(process.is_alive), signal.SIGKILL)
    assert published(tmp_path / "run")[0] == saved
    done = train(tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == straight
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "validation_loss" in line] == [*range(0, 26, 5), 26]


@pytest.mark.computes(2)
def test_two_processes_killed_in_a_save_resume_exactly(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    words = ["train.tinyllama", *SETTINGS, "--max_steps", "12", "--run_folder"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = ranks.run("zero2", 2, *words, str(straight), environment=clean_environment)
    assert done.returncode == 0, done.stderr
    # The first of the two to have written half of its part; the other may have written all.
    for moment in ("in-shard", "before-rename"):
        pause = Pause(tmp_path, moment, time=4)
        environment = clean_environment | pause.variable
        with Ranks("zero2", 2, *words, str(killed), environment=environment) as processes:
            assert pause.wait(processes.are_alive) in processes.pids
            # Stopped first: between two kills, the second might end because it lost the first.
            for ends, pid in itertools.product((signal.SIGSTOP, signal.SIGKILL), processes.pids):
                os.kill(pid, ends)
            assert [rank.wait() for rank in processes.ranks] == [-signal.SIGKILL] * 2
    assert published(killed) == [6, 5]
    done = ranks.run("zero2", 2, *words, str(killed), environment=clean_environment)
    assert done.returncode == 0, done.stderr
    assert "resuming from step-00000006, step 6\n" in done.stdout
    assert losses(killed) == losses(straight)


@pytest.mark.computes(2)
def test_a_killed_rank_ends_the_run_with_one_line_from_the_other(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    pause = Pause(tmp_path, "after-step", time=12)
    # Long, so that it is not what ends the wait for the other.
    words = [*settings_for(tmp_path / "run", "--max_steps", "100000"), "--timeout_s", "86400"]
    environment = clean_environment | pause.variable
    with Ranks("ddp", 2, "train.tinyllama", *words, environment=environment) as processes:
        victim = processes.pids.index(pause.wait(processes.are_alive))
        os.kill(processes.pids[victim], signal.SIGKILL)
        done = processes.ranks[1 - victim].end()
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith(f"error: rank {1 - victim}: lost contact with another process (")
    assert "Traceback" not in done.stderr


# ---- requests to stop ----


def test_a_signal_during_evaluation_saves_and_the_evaluation_is_made_up_for(
    start: Start, train: Train, tmp_path: Path
) -> None:
    # One sequence a batch: 20 batches, after every tenth of which it looks for a signal.
    words = [
        *("--evaluation.every_steps", "2", "--evaluation.max_tokens", "1280"),
        *("--batch.micro_batch_size", "1", "--max_steps", "3"),
    ]
    pause = Pause(tmp_path, "in-evaluation", time=23)
    with start(tmp_path / "run", *words, pause=pause) as process:
        # In the second evaluation, that of step 2.
        os.kill(pause.wait(process.is_alive), signal.SIGTERM)
        pause.go_on()
        done = process.end()
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGTERM at step 2" in done.stdout
    assert published(tmp_path / "run") == [2, 1]
    lines = read_metrics(tmp_path / "run")
    assert "validation_loss" not in lines[2]
    assert train(tmp_path / "run", *words).returncode == 0
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "loss" in lines[2] and "validation_loss" in lines[2]


@pytest.mark.computes(2)
def test_a_signal_to_one_rank_saves_the_step_after_it_and_goes_on_there(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    pause = Pause(tmp_path, "after-step", time=5)
    words = settings_for(tmp_path / "run", "--max_steps", "9", "--checkpoint.every_steps", "1000")
    environment = clean_environment | pause.variable
    with Ranks("ddp", 2, "train.tinyllama", *words, environment=environment) as processes:
        os.kill(pause.wait(processes.are_alive), signal.SIGUSR1)
        pause.go_on()
        ended = processes.end()
    assert [done.returncode for done in ended] == [75, 75]
    outcome = json.loads((tmp_path / "run/attempts/1/outcome.json").read_text())
    # Both agree on it when they add up the loss of the next step.
    assert (outcome["outcome"], outcome["step"]) == ("stopped", 6)
    assert published(tmp_path / "run") == [6]
    assert sorted(losses(tmp_path / "run")) == list(range(1, 7))
    done = ranks.run("ddp", 2, "train.tinyllama", *words, environment=clean_environment)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "run")) == list(range(1, 10))


# ---- damage ----


def flip_a_byte(folder: Path) -> None:
    shard = next(folder.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


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
        with Forked("train.tinyllama", *words, environment=clean_environment) as process:
            done = process.end()
        assert done.returncode == 0, done.stderr
    return folder / "six", folder / "eight"


# Every kind of damage: tests/fast/train/engine/test_checkpoint.py.
@pytest.mark.parametrize(
    ("damage", "words"),
    [(flip_a_byte, "does not match its sha256"), (empty_the_folder, "manifest.json is missing")],
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
    for folder in checkpoints.published(run / "checkpoints"):
        flip_a_byte(folder)
    done = train(run, "--max_steps", "8")
    assert done.returncode == 1
    assert "none of the 2 checkpoints is complete" in done.stderr
    assert losses(run) == losses(a_run[0])


# ---- no room, no right ----


@pytest.mark.needs("unshare")
def test_a_full_disk_is_one_error_and_the_earlier_checkpoints_stay(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    # A file system of its own that holds one checkpoint of 1.9 MB and not a second.
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["--max_steps", "20", "--checkpoint.every_steps", "5"]
    command = [sys.executable, "-m", "train.tinyllama", *settings_for(disk / "run", *words)]
    copy = tmp_path / "copy"
    inside = 'mount -t tmpfs -o size=3m none "$1"; shift; disk=$1; copy=$2; shift 2; "$@"; '
    inside += 'code=$?; cp -a "$disk/run" "$copy"; exit $code'
    done = waiting.run(
        ["unshare", "-rm", "sh", "-c", inside, "sh", disk, disk, copy, *command],
        cwd=CHECKOUT,
        env=clean_environment,
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
    assert published(copy) == [5]


def test_a_second_run_on_the_same_folder_is_refused(
    start: Start, train: Train, tmp_path: Path
) -> None:
    pause = Pause(tmp_path, "after-step", time=3)
    with start(tmp_path / "run", pause=pause) as first:
        pause.wait(first.is_alive)
        second = train(tmp_path / "run")
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert "in use by another run (process " + str(first.pid) in line
    done = train(tmp_path / "run", "--max_steps", "3")
    assert done.returncode == 0, "the lock outlived its holder"


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


@pytest.mark.computes(2)
def test_a_loss_that_is_not_finite_ends_two_processes_with_one_error(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    words = settings_for(tmp_path, "--optimizer.lr", "1e25", "--schedule.warmup_steps", "0")
    done = ranks.run("ddp", 2, "train.tinyllama", *words, environment=clean_environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "is not finite (rank 0, positions " in done.stderr
    assert "Traceback" not in done.stderr
    # Nothing of it was trained on.
    found = losses(tmp_path)
    assert 1 in found and all(loss < 1e30 for loss in found.values())


# ---- memory that is used up ----


def test_a_model_that_is_too_large_for_the_memory_is_said_with_what_helps(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    # In fp32 its weights alone are 418 MiB, and as much again their gradients.
    words = settings_for(tmp_path, "--model.preset", "110m", "--data.sequence_length", "16")
    module = ("tests.real.train.worker_limited", "600", "train.tinyllama")
    done = ranks.run("ddp", 1, *module, *words, environment=clean_environment)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("error: rank 0: out of memory (")
    assert "ACCEL=fsdp2" in said[0]
