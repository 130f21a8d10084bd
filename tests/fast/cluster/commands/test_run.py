"""run.py: what a job on this machine is started with, recorded as, and continued from.

The checkout's slurm/node.sh notes its environment instead of training; all else is real. Training
for real, by this road, is in tests/fast/train/test_hub.py and tests/real/train.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.commands import run
from runfolder import launch
from tests import waiting
from tests.checkout import lay_out, rewrite
from tests.fast import command
from tests.shared import CHECKOUT

NODE = """#!/usr/bin/env bash
run=$SLUICE_RUN_FOLDER
printf '%s\\n' "$@" > "$run/words"
here=$PWD
cd "$(dirname "$0")/.."
source slurm/environment.sh
env > "$run/environment"
cd "$here"
echo training
echo 'error: a rank says' >&2
echo 'error: a rank says' >&2
"""


@dataclass
class Checkout:
    """A checkout, and the environment to run it in."""

    root: Path
    environment: dict[str, str]
    capfd: pytest.CaptureFixture[str]

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return command.call(
            run.main,
            *words,
            folder=self.root,
            environment=self.environment | environment,
            capfd=self.capfd,
        )

    def start(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        """Start it as a process."""
        return waiting.start(
            [sys.executable, "-m", "cluster", "run", *words],
            cwd=self.root,
            env=self.environment | more.pop("env", {}),
            **more,
        )

    def node(self, script: str) -> None:
        """Let slurm/node.sh end with these lines of bash."""
        rewrite(self.root / "slurm/node.sh", NODE + script + "\n", 0o755)

    @property
    def folder(self) -> Path:
        """The only run."""
        [folder] = (self.root / "runs/tinyllama").iterdir()
        return folder

    def seen(self) -> dict[str, str]:
        """The environment that the node was given."""
        lines = (self.folder / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def checkout(
    tmp_path: Path, clean_environment: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> Checkout:
    root = tmp_path / "a checkout"
    lay_out(root, "cluster/", "runfolder/", "configs/", "containers/locks/", "slurm/", "train/")
    # The environment of the tests has all; what the command asks for is noted.
    rewrite(root / "containers/venv.sh", '#!/bin/sh\necho "$VENV $@" >> set-up\n', 0o755)
    environment = {k: v for k, v in clean_environment.items() if k != "SLUICE_DATASETS"}
    environment |= {"HOME": str(tmp_path), "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    found = Checkout(root, environment, capfd)
    found.node("")
    return found


def settings(checkout: Checkout) -> Any:
    return yaml.safe_load((checkout.folder / "config.yaml").read_text())


# ---- the first attempt ----


def test_a_run_is_recorded_and_started_with_what_was_resolved(checkout: Checkout) -> None:
    done = checkout.run("--dry_run", "--accel", "zero2", "--name", "it", "--", "--max_steps", "7")
    assert done.returncode == 0, done.stderr
    folder = checkout.folder
    assert folder.name.endswith("-it")
    assert settings(checkout)["max_steps"] == 7
    assert settings(checkout)["staged"]["train"].startswith("packed/")
    record = json.loads((folder / "run.json").read_text())
    assert (record["job"], record["accel"], record["num_processes"]) == ("tinyllama", "zero2", 2)
    assert shlex.split(record["command"])[:5] == [
        *("make", "run", "JOB=tinyllama", "ACCEL=zero2", "NPROC=2")
    ]
    assert (record["runtime"], record["image"]) == ("host", None)
    words = (folder / "words").read_text().splitlines()
    assert words == ["--config", str(folder / "config.yaml")]
    expected = {
        "SLUICE_ACCEL": "zero2",
        "SLUICE_ATTEMPT": "1",
        "SLUICE_DATASETS": str(checkout.root / "datasets"),
        "SLUICE_DEVICE": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "SLUICE_NODE_RANK": "0",
        "SLUICE_RUN_FOLDER": str(folder),
        "SLUICE_TERMINAL": "0",
        "SLUICE_WORLD_SIZE": "2",
        "HF_HOME": str(checkout.root / "cache/huggingface"),
        "HF_TOKEN_PATH": str(checkout.root.parent / ".cache/huggingface/token"),
        "PYTHONNOUSERSITE": "1",
    }
    seen = checkout.seen()
    assert {name: seen.get(name) for name in expected} == expected
    resolved = {
        "datasets": str(checkout.root / "datasets"),
        "host_python": sys.executable,
        "image": "",
        "module": "train.tinyllama",
        "num_nodes": "1",
    }
    assert launch.read(folder).items() >= resolved.items()
    assert not Path(seen["SLUICE_SCRATCH"]).exists()


def test_the_output_is_shown_and_logged_and_an_error_of_two_ranks_said_once(
    checkout: Checkout,
) -> None:
    done = checkout.run("--dry_run")
    assert "\ntraining\n" in done.stdout
    assert done.stderr == "error: a rank says\n"
    log = (checkout.folder / "attempts/1/node-0.log").read_text()
    assert sorted(log.splitlines()) == ["error: a rank says", "training"]


def test_the_users_own_cache_of_the_hub_is_used(checkout: Checkout) -> None:
    assert checkout.run("--dry_run", HF_HOME="/somewhere").returncode == 0
    assert checkout.seen()["HF_HOME"] == "/somewhere"
    assert "HF_TOKEN_PATH" not in checkout.seen()
    shutil.rmtree(checkout.root / "runs")
    assert checkout.run("--dry_run", SLUICE_CACHE="/scratch/me").returncode == 0
    assert checkout.seen()["HF_HOME"] == "/scratch/me/huggingface"


@pytest.mark.parametrize("words", [["--dry_run"], ["--nproc", "5", "--", "--model.preset", "tiny"]])
def test_a_dry_run_and_a_run_on_the_cpu_see_no_gpus(checkout: Checkout, words: list[str]) -> None:
    local = [f"--data.{split}=train/samples/{split}.txt" for split in ("train", "validation")]
    if "--dry_run" not in words:
        words = [*words, *local, "--batch.global_batch_size", "5", "--data.sequence_length", "32"]
    device = {} if "--dry_run" in words else {"SLUICE_DEVICE": "cpu"}
    done = checkout.run(*words, CUDA_VISIBLE_DEVICES="0,1,2", **device)
    assert done.returncode == 0, done.stderr
    seen = checkout.seen()
    assert (seen["SLUICE_DEVICE"], seen["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")


def test_with_gpus_there_is_one_process_for_each_and_never_more(checkout: Checkout) -> None:
    words = ["--", "--model.preset", "tiny", "--batch.global_batch_size", "12"]
    words += [f"--data.{split}=train/samples/{split}.txt" for split in ("train", "validation")]
    words += ["--data.sequence_length", "32"]
    done = checkout.run(*words, CUDA_VISIBLE_DEVICES="0,1,2")
    assert done.returncode == 0, done.stderr
    assert checkout.seen()["SLUICE_WORLD_SIZE"] == "3"
    assert checkout.seen()["SLUICE_DEVICE"] == "cuda"
    # Paths of the command line hold wherever the run goes on.
    assert settings(checkout)["data"]["train"] == str(checkout.root / "train/samples/train.txt")
    done = checkout.run("--nproc", "4", *words, CUDA_VISIBLE_DEVICES="0,1,2")
    assert done.stderr == "error: NPROC=4: this machine has 3 GPUs, and each process needs one\n"


@pytest.mark.parametrize(("script", "code"), [("exit 1", 1), ("exit 75", 75), ("kill -9 $$", 137)])
def test_the_exit_code_is_that_of_the_node(checkout: Checkout, script: str, code: int) -> None:
    checkout.node(script)
    done = checkout.run("--dry_run")
    assert done.returncode == code
    assert f"failed with exit code {code}; log: runs/tinyllama/" in done.stdout
    assert "continue from" not in done.stdout


def test_a_run_that_failed_after_a_checkpoint_says_how_to_go_on(checkout: Checkout) -> None:
    checkout.node('mkdir -p "$SLUICE_RUN_FOLDER/checkpoints/step-00000005"; exit 1')
    done = checkout.run("--dry_run")
    assert "continue from the last checkpoint with: make run RUN=" in done.stdout


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        ({"outcome": "finished", "step": 7, "checkpoint": "step-7"}, "finished at step 7"),
        ({"outcome": "stopped", "step": 7, "reason": "SIGTERM"}, "stopped at step 7 (SIGTERM)"),
    ],
)
def test_how_it_ended_and_what_comes_next_is_said(
    checkout: Checkout, outcome: dict[str, object], said: str
) -> None:
    path = '"$SLUICE_RUN_FOLDER/attempts/$SLUICE_ATTEMPT/outcome.json"'
    checkout.node(f"echo '{json.dumps(outcome)}' > {path}")
    out = checkout.run("--dry_run").stdout
    assert said in out
    assert f"RUN=tinyllama/{checkout.folder.name}" in out


def test_the_curves_are_shown_by_our_own_python_whatever_the_paths(
    checkout: Checkout, tmp_path: Path
) -> None:
    path = '"$SLUICE_RUN_FOLDER/attempts/$SLUICE_ATTEMPT/outcome.json"'
    outcome = {"outcome": "finished", "step": 7, "checkpoint": "step-7"}
    checkout.node(f"echo '{json.dumps(outcome)}' > {path}")
    out = checkout.run("--dry_run", SLUICE_RUNS=str(tmp_path / "my runs")).stdout
    words = shlex.split(out.splitlines()[-1])
    [run] = (tmp_path / "my runs/tinyllama").iterdir()
    command = ["slurm/isolated.sh", sys.executable, "-m", "tensorboard.main", "--logdir"]
    assert words == [*command, str(run / "tensorboard")]


def test_a_signal_reaches_the_node_which_ends_in_its_own_time(checkout: Checkout) -> None:
    os.mkfifo(checkout.root / "go")
    checkout.node(
        "trap 'kill $!; echo asked; read -r _ <go; exit 75' TERM\n"
        "sleep 600 >/dev/null 2>&1 & echo ready; wait"
    )
    process = checkout.start("--dry_run")
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    # It reads this only while the node is still at it.
    (checkout.root / "go").write_text("\n")
    assert waiting.finish(process).returncode == 75


# ---- the next attempts ----


def test_a_run_goes_on_with_its_own_code_settings_and_processes(checkout: Checkout) -> None:
    assert checkout.run("--dry_run", "--accel", "zero1", "--nproc", "4").returncode == 0
    # What happens in the checkout since is nothing to the run.
    checkout.node("exit 1")
    rewrite(checkout.root / "train/engine/settings.py", "an error")
    (checkout.root / "configs/jobs/tinyllama.yaml").unlink()
    name = checkout.folder.name
    process = checkout.start("--job", "other", "--run", name, "--", "--max_steps", "30")
    done = waiting.finish(process)
    assert done.returncode == 0, done.stderr
    assert "attempt 2" in done.stdout
    assert "staging" not in done.stdout
    seen = checkout.seen()
    assert (seen["SLUICE_ATTEMPT"], seen["SLUICE_ACCEL"]) == ("2", "zero1")
    assert seen["SLUICE_WORLD_SIZE"] == "4"
    assert settings(checkout)["max_steps"] == 30
    assert settings(checkout)["optimizer"]["lr"] == 3e-3
    assert checkout.run("--run", name, "--nproc", "2", "--accel", "ddp").returncode == 0
    assert checkout.seen()["SLUICE_WORLD_SIZE"] == "2"
    assert settings(checkout)["max_steps"] == 30


def test_a_continuation_that_is_refused_changes_nothing(checkout: Checkout) -> None:
    assert checkout.run("--dry_run").returncode == 0
    folder = checkout.folder
    before = (folder / "config.yaml").read_text()
    for words in (["--", "--max_steps", "x"], ["--nproc", "3"], ["--", "--data.train", "none"]):
        done = checkout.run("--run", folder.name, *words)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert (folder / "config.yaml").read_text() == before
    assert [path.name for path in (folder / "attempts").iterdir()] == ["1"]


def test_settings_that_the_run_itself_refuses_are_not_kept(checkout: Checkout) -> None:
    assert checkout.run("--dry_run").returncode == 0
    folder = checkout.folder
    before = (folder / "config.yaml").read_text()
    # The code of the run, which alone knows what its checkpoint was made with.
    node = folder / "code/slurm/node.sh"
    text = node.read_text()
    rewrite(node, "#!/usr/bin/env bash\nexit 2\n")
    node.chmod(0o755)
    done = checkout.run("--run", folder.name, "--", "--seed", "7")
    assert done.returncode == 2
    assert (folder / "config.yaml").read_text() == before
    rewrite(node, text)
    node.chmod(0o755)
    assert checkout.run("--run", folder.name, "--", "--seed", "7").returncode == 0
    assert settings(checkout)["seed"] == 7


# ---- in an image ----


def make_image(checkout: Checkout, content: bytes, **extra: str) -> dict[str, str]:
    """Put a file that passes for an image into the checkout; return the variable that it takes."""
    folder = checkout.root / "images"
    folder.mkdir(exist_ok=True)
    (folder / "sluice-cpu.sif").write_bytes(content)
    locks = [checkout.root / f"containers/locks/{n}.txt" for n in ("pip", "torch-cpu", "cpu")]
    manifest: dict[str, Any] = {
        "variant": "cpu",
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "lock_sha256": hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest(),
    }
    if extra:
        manifest["extra_packages"] = extra
    (folder / "sluice-cpu.json").write_text(json.dumps(manifest))
    # Nothing here runs in it: that is in test_container.py, and in tests/real/containers.
    program = checkout.root.parent / "apptainer"
    rewrite(program, "#!/bin/sh\nexit 1\n", 0o755)
    return {"APPTAINER": str(program)}


def test_a_run_in_an_image_is_recorded_and_goes_on_in_the_one_of_today(checkout: Checkout) -> None:
    done = checkout.run("--dry_run", **make_image(checkout, b"one"))
    assert (done.returncode, done.stderr) == (0, "error: a rank says\n")
    assert "(in images/sluice-cpu.sif), attempt 1" in done.stdout
    assert not (checkout.root / "set-up").exists()
    record = json.loads((checkout.folder / "run.json").read_text())
    image = checkout.root / "images/sluice-cpu.sif"
    one, two = (hashlib.sha256(content).hexdigest() for content in (b"one", b"two"))
    assert (record["runtime"], record["image"]) == (
        "apptainer",
        {"path": str(image), "sha256": one},
    )
    assert len(record["lock_sha256"]) == 64
    values = launch.read(checkout.folder)
    assert (values["image"], values["image_sha256"]) == (str(image), one)
    assert (values["binds"], values["host_python"]) == ("", "")

    name = checkout.folder.name
    same = checkout.run("--run", name, **make_image(checkout, b"one"))
    assert same.stderr == "error: a rank says\n"
    other = checkout.run("--run", name, **make_image(checkout, b"two"))
    assert other.returncode == 0
    assert other.stderr.splitlines()[0] == (
        f"note: the run began in {image} ({one[:12]}), now in {image} ({two[:12]})"
    )
    host = checkout.run("--run", name, "--runtime", "host")
    assert host.stderr.splitlines()[0] == (
        f"note: the run began in {image} ({one[:12]}), now on the host"
    )
    assert "(on the host, no container), attempt 4" in host.stdout


def test_a_run_goes_on_only_with_the_extra_packages_that_it_began_with(checkout: Checkout) -> None:
    assert checkout.run("--dry_run", **make_image(checkout, b"one", trl="1.0")).returncode == 0
    record = json.loads((checkout.folder / "run.json").read_text())
    assert record["extra_packages"] == {"trl": "1.0"}
    name = checkout.folder.name
    # Another file with the same packages will do.
    same = checkout.run("--run", name, **make_image(checkout, b"two", trl="1.0"))
    assert same.returncode == 0, same.stderr
    for runtime, extra, differs in (
        ("apptainer", {"trl": "2", "new": "3"}, "new was absent and is 3, trl was 1.0 and is 2;"),
        ("apptainer", {}, "the extra packages in images/sluice-cpu.sif are not those that the run"),
        ("host", {}, "the extra packages on the host are not those that the run began with: trl "),
    ):
        image = make_image(checkout, b"one", **extra)
        done = checkout.run("--run", name, "--runtime", runtime, **image)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert differs in done.stderr
    assert sorted(path.name for path in (checkout.folder / "attempts").iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    ("words", "content"), [(["--", "--max_step", "1"], b"one"), (["--image", "x.sif"], b"one")]
)
def test_what_is_refused_before_a_run_in_an_image_leaves_nothing(
    checkout: Checkout, words: list[str], content: bytes
) -> None:
    done = checkout.run("--dry_run", *words, **make_image(checkout, content))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert not (checkout.root / "runs").exists()
    assert not (checkout.root / "datasets").exists()


def test_a_damaged_image_starts_nothing(checkout: Checkout) -> None:
    variables = make_image(checkout, b"one")
    (checkout.root / "images/sluice-cpu.sif").write_bytes(b"onf")
    for words in (["--dry_run"], ["--fetch"], ["--dry_run", "--runtime", "apptainer"]):
        done = checkout.run(*words, **variables)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert "its checksum does not match its manifest" in done.stderr
    assert not (checkout.root / "runs").exists()
    assert not (checkout.root / "datasets").exists()


# ---- the command itself ----


def test_help_is_there_before_anything_heavy_is_imported(
    clean_environment: dict[str, str],
) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "cluster", "run", "--help"]
    done = waiting.run(words, cwd=CHECKOUT, env=clean_environment)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m cluster run")
    imported = {name.partition(".")[0] for name in re.findall(r"\| +(\S+)\n", done.stderr)}
    installed = {path.name for path in Path(yaml.__file__).parents[1].iterdir()}
    # The second is setuptools', at the start of every Python.
    assert imported & installed - {"_distutils_hack"} == {"yaml"}


def test_the_settings_of_the_script_are_one_question_away(checkout: Checkout) -> None:
    done = checkout.run("--", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--optimizer.lr LR" in done.stdout
    assert not (checkout.root / "runs").exists()


def test_a_reader_that_leaves_is_no_traceback_and_the_log_goes_on(checkout: Checkout) -> None:
    os.mkfifo(checkout.root / "go")
    checkout.node("read -r _ <go; echo more; exit 1")
    process = checkout.start("--dry_run")
    assert process.stdout is not None
    while process.stdout.readline() != "training\n":
        assert process.poll() is None
    process.stdout.close()
    process.stdout = None
    (checkout.root / "go").write_text("\n")
    done = waiting.finish(process)
    assert (done.returncode, done.stderr) == (141, "error: a rank says\n")
    log = (checkout.folder / "attempts/1/node-0.log").read_text()
    assert sorted(log.splitlines()) == ["error: a rank says", "more", "training"]


def test_an_interrupted_fetch_says_nothing_and_leaves_nothing(checkout: Checkout) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = checkout.start("--fetch", env={"HF_ENDPOINT": endpoint}, start_new_session=True)
        # It has asked, and waits for an answer.
        silent.settimeout(waiting.HANGS_AFTER_S)
        connection, _ = silent.accept()
        with connection:
            connection.settimeout(waiting.HANGS_AFTER_S)
            assert connection.recv(1)
            os.killpg(process.pid, signal.SIGINT)
            done = waiting.finish(process)
    assert (done.returncode, done.stderr) == (130, "")
    assert not list(checkout.root.glob("datasets/*/.*.unfinished"))
