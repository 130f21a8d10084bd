"""The front door as a new user finds it: a fresh checkout, an environment, make, no network."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import waiting
from tests.checkout import lay_out, rewrite
from tests.conftest import losses, read_metrics
from tests.moments import Pause
from tests.shared import CHECKOUT
from train.engine.checkpoint_reader import find_damage

pytestmark = pytest.mark.needs("unshare", "git")

# What make, bash and the scripts call. Nothing else is on the PATH of the bare checkout: no
# compiler, so that a strategy that compiles something when it starts would fail.
COMMANDS = ("make", "bash", "sh", "env", "dirname", "grep", "git")

# A new network namespace has a loopback interface that is down, and nothing that leads outside.
WITHOUT_NETWORK = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    try:
        control.connect(("192.0.2.1", 9))
    except OSError:
        os.execvp(sys.argv[1], sys.argv[1:])
sys.exit("the network is not cut")
"""


class Checkout:
    """A copy of the checkout, committed, with an edit that is not."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        # A blank, because people have them in the names of their folders.
        self.folder = lay_out(folder / "my sluice")
        (folder / "home").mkdir()
        self.environment = environment | {
            "HOME": str(folder / "home"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "VENV": str(self._environment_of_python(folder / "environment")),
        }
        self.git("init", "--quiet")
        self.git("add", "--all")
        author = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        self.git(*author, "commit", "--quiet", "--no-verify", "--message", "all")
        changelog = self.folder / "CHANGELOG.md"
        rewrite(changelog, changelog.read_text() + "An edit.\n")
        bare = folder / "bin"
        bare.mkdir()
        for command in COMMANDS:
            (bare / command).symlink_to(str(shutil.which(command)))
        self.bare_path = str(bare)
        compilers = ("cc", "gcc", "g++", "c++", "clang", "nvcc", "ninja")
        assert not [name for name in compilers if shutil.which(name, path=self.bare_path)]

    def _environment_of_python(self, folder: Path) -> Path:
        """Return an environment that is the tests' own and that venv.sh takes as made by itself.

        Links, so that venv.sh, should it find something out of date, has nothing to delete here.
        """
        folder.mkdir()
        for name in ("bin", "lib"):
            (folder / name).symlink_to(Path(sys.prefix) / name)
        shutil.copyfile(Path(sys.prefix) / "pyvenv.cfg", folder / "pyvenv.cfg")
        system, python = os.uname(), "python{}.{}".format(*sys.version_info)
        lines = ""
        for flavour, names in (("base", ("pip", "base")), ("cpu", ("pip", "cpu", "torch-cpu"))):
            locks = [self.folder / f"containers/locks/{name}.txt" for name in names]
            digest = hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest()
            lines += f"{flavour} {system.sysname} {system.machine} {python} {digest}\n"
        (folder / ".sluice-stamp").write_text(lines)
        return folder

    def git(self, *arguments: str) -> bytes:
        return subprocess.run(
            ["git", *arguments],
            cwd=self.folder,
            env=self.environment,
            check=True,
            stdout=subprocess.PIPE,
        ).stdout

    def start(
        self, *command: str, path: str | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        """Start a command in the checkout, without a network, in a process group of its own."""
        unshare = str(shutil.which("unshare"))
        return subprocess.Popen(
            [unshare, "--map-root-user", "--net", sys.executable, "-c", WITHOUT_NETWORK, *command],
            cwd=self.folder,
            env=self.environment | ({"PATH": path} if path else {}) | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return waiting.finish(self.start(*command, path=path))

    def named(self, output: str, what: str) -> Path:
        """Return the path that a run's last lines give for `what`."""
        [path] = re.findall(rf"^  {what} +(\S+)(?:  \(.*)?$", output, re.MULTILINE)
        return self.folder / path


@pytest.fixture(scope="module")
def checkout(
    tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> Checkout:
    """Return the checkout that the tests of this file share, as the runs of one user do."""
    environment = {k: v for k, v in clean_environment.items() if k != "SLUICE_DATASETS"}
    user = tmp_path_factory.mktemp("user")
    # As after `module load python` on many clusters.
    for name in ("rich", "yaml", "numpy"):
        rewrite(user / f"module/{name}.py", "raise SystemExit('wrong')\n")
    environment |= {"PYTHONPATH": str(user / "module"), "PYTHONSAFEPATH": "1"}
    return Checkout(user, environment)


@pytest.mark.computes(2)
def test_a_dry_run_of_a_script_of_ones_own_ends_after_three_steps(checkout: Checkout) -> None:
    shutil.copytree(CHECKOUT / "tests/real/fit", checkout.folder.parent / "fit")
    done = checkout.run("make", "dry-run", "JOB=../fit/fit.yaml", path=checkout.bare_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dry run: ended after 3 optimizer steps" in done.stdout
    assert "finished after 3 optimizer steps" in done.stdout
    run = checkout.named(done.stdout, "run folder")
    # It ends within the third step, before the script prints its loss.
    assert done.stdout.count("loss ") == 2
    assert (run / "code/script/fit.py").read_bytes() == (
        CHECKOUT / "tests/real/fit/fit.py"
    ).read_bytes()


def test_ctrl_c_asks_a_script_of_ones_own_to_save_and_it_goes_on(checkout: Checkout) -> None:
    own = checkout.folder.parent / "saves"
    own.mkdir()
    shutil.copy(CHECKOUT / "tests/real/fit/saves.py", own)
    (own / "saves.yaml").write_text(
        "script: saves.py\nresume_arguments: [--resume]\ncheckpoints: saved\n"
    )
    process = checkout.start("make", "run", "JOB=../saves/saves.yaml", "NPROC=1")
    runs = checkout.folder / "runs/saves"
    waiting.wait_until(lambda: any(runs.glob("*/ready")), "the script is ready")
    os.killpg(process.pid, signal.SIGINT)
    done = waiting.finish(process)
    (run,) = runs.iterdir()
    assert (run / "saved").read_text() == "SIGUSR1", done.stdout + done.stderr
    assert "(Ctrl+C)" in done.stdout
    again = checkout.run("make", "run", "RUN=saves")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "finished after" in again.stdout


# ZeRO-1 and 2 are started as ZeRO-3 is (train/test_launcher.py); all of them train in
# train/test_trajectories.py.
@pytest.mark.computes(2)
@pytest.mark.parametrize("accel", ["ddp", "zero3", "zero3_offload", "fsdp2"])
def test_a_dry_run_works_without_network_and_compiler_and_its_folder_is_whole(
    checkout: Checkout, accel: str
) -> None:
    done = checkout.run("make", "dry-run", f"ACCEL={accel}", path=checkout.bare_path)
    assert_trained(checkout, done, accel=accel)
    if accel == "ddp":
        next_commands_work(checkout, done.stdout)


@pytest.mark.computes(2)
@pytest.mark.parametrize("job", ["ag_news", "causal_lm", "imdb", "rag", "chat"])
def test_a_dry_run_of_a_lab_works_so_too(checkout: Checkout, job: str) -> None:
    done = checkout.run("make", "dry-run", f"JOB={job}", path=checkout.bare_path)
    assert done.returncode == 0, done.stdout + done.stderr
    complaints = [line for line in done.stderr.splitlines() if "hostname of the client" not in line]
    assert complaints == []
    assert "dry run: stopped as a cluster would stop it; resuming" in done.stdout
    assert "resuming from step-" in done.stdout
    assert re.search(r"^finished at step \d+$", done.stdout, re.MULTILINE)
    run = checkout.named(done.stdout, "run folder")
    assert checkout.named(done.stdout, "checkpoint").is_dir()
    [outcome] = [json.loads(path.read_text()) for path in run.glob("attempts/*/outcome.json")]
    assert all(math.isfinite(value) for value in outcome["metrics"].values())
    if job == "rag":
        found = checkout.run("make", "ask", "RUN=rag", "Q=How do sailors know a lighthouse?")
        assert found.returncode == 0, found.stderr
        assert re.search(r"\blighthouse\b", found.stdout)
    if job == "chat":
        # Nobody says anything; the model and its chat template are there.
        talk = checkout.run("make", "chat", "RUN=chat")
        assert (talk.returncode, talk.stderr) == (0, "note: on the host, no container\n")


def next_commands_work(checkout: Checkout, output: str) -> None:
    """Run the two commands that a dry run names at its end."""
    lines = output.partition("next: ")[2].splitlines()
    generate, tensorboard = (shlex.split(line) for line in lines)
    text = checkout.run(*generate)
    assert (text.returncode, text.stderr) == (0, "note: on the host, no container\n")
    assert text.stdout.startswith("The cluster")
    assert len(text.stdout) > len("The cluster\n")
    # Not the server, but what it would show.
    curves = checkout.run(*tensorboard, "--inspect")
    assert curves.returncode == 0, curves.stderr
    assert "bits_per_byte" in curves.stdout


def assert_trained(
    checkout: Checkout,
    done: subprocess.CompletedProcess[str],
    *,
    accel: str,
) -> None:
    """Check what a dry run said and what it left, against each other."""
    assert done.returncode == 0, done.stdout + done.stderr
    # Without a name server torch cannot name its peers.
    complaints = [line for line in done.stderr.splitlines() if "hostname of the client" not in line]
    assert complaints == []
    assert "warning" not in done.stdout.lower(), done.stdout
    strategy = accel.removesuffix("_offload")
    assert f"\n{strategy}, 2 x CPU, fp32: 158,016 parameters" in done.stdout
    assert "dry run: stopped as a cluster would stop it; resuming" in done.stdout
    assert "resuming from step-" in done.stdout

    # What it names is there, and whole.
    assert "\nfinished at step 20\n" in done.stdout
    run, saved = (
        checkout.named(done.stdout, "run folder"),
        checkout.named(done.stdout, "checkpoint"),
    )
    assert run.parent == checkout.folder / "runs/tinyllama"
    assert saved == run / "checkpoints/step-00000020"
    assert find_damage(saved) is None
    assert (run / "checkpoints/latest").read_text() == "step-00000020\n"
    model = {path.name for path in checkout.named(done.stdout, "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= model
    assert f'next: make generate RUN=tinyllama/{run.name} PROMPT="The cluster"\n' in done.stdout

    # The record of the run, from which it can be made again.
    record = json.loads((run / "run.json").read_text())
    assert record["git_commit"] == checkout.git("rev-parse", "HEAD").decode().strip()
    diff = checkout.git("diff", "HEAD")
    assert b"+An edit." in diff
    assert record["git_diff_sha256"] == hashlib.sha256(diff).hexdigest()
    assert (run / "code.diff").read_bytes() == diff
    assert (run / "code/CHANGELOG.md").read_text().endswith("An edit.\n")
    assert (record["accel"], record["num_processes"]) == (accel, 2)
    command = ["make", "run", "JOB=tinyllama", f"ACCEL={accel}", "NPROC=2"]
    assert shlex.split(record["command"]) == [*command, "ARGS=--dry_run"]
    for file in ("code/train/tinyllama.py", "code/slurm/node.sh", "config.yaml"):
        assert (run / file).stat().st_size > 0
    log = (run / "attempts/1/node-0.log").read_text().splitlines()
    assert [line for line in log if line.startswith("step     20 ")]
    assert set(log) <= set((done.stdout + done.stderr).splitlines())
    outcome = json.loads((run / "attempts/1/outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"]) == ("finished", 20)
    assert [line["step"] for line in read_metrics(run)] == [0, 5, 10, 15, 20]
    assert list((run / "tensorboard").glob("events.*"))
    assert {path.name for path in run.iterdir()} == {
        *("launch.env", "run.json", "config.yaml", "code", "code.diff", "run.lock", "attempts"),
        *("metrics.jsonl", "tensorboard", "checkpoints", "export"),
    }
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.computes(2)
def test_ctrl_c_saves_and_says_how_to_go_on_and_the_run_goes_on_to_its_end(
    checkout: Checkout, tmp_path: Path
) -> None:
    settings = "--model.preset tiny --data.sequence_length 32 --batch.global_batch_size 4 "
    settings += "--data.train train/samples/train.txt --log_every_steps 1 --max_steps 90000 "
    settings += "--data.validation train/samples/validation.txt --checkpoint.every_steps 1000 "
    settings += "--evaluation.max_tokens 64 --optimizer.lr 1e-3 --export false"
    pause = Pause(tmp_path, "after-step", time=12)
    process = checkout.start("make", "run", "NPROC=2", f"ARGS={settings}", **pause.variable)
    pause.wait(lambda: process.poll() is None)
    # As a terminal does: to make, and to all in the foreground with it.
    os.killpg(process.pid, signal.SIGINT)
    pause.go_on()
    done = waiting.finish(process)
    output = done.stdout
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    run = checkout.folder / re.findall(r"^run folder (\S+) ", output, re.MULTILINE)[0]
    assert not processes_of(run), "something was left running"
    step = max(losses(run))
    assert step >= 12
    assert f"\nstopped at step {step} (SIGINT), saved\n" in output
    assert (run / "checkpoints/latest").read_text() == f"step-{step:08d}\n"
    assert find_damage(run / f"checkpoints/step-{step:08d}") is None
    [command] = re.findall(r"^continue with: (.*)$", output, re.MULTILINE)
    assert command == f"make run RUN=tinyllama/{run.name}"

    # The newest run of its job, so that the job's name is enough.
    done = checkout.run("make", "run", "RUN=tinyllama", f"ARGS=--max_steps {step + 3}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run folder runs/tinyllama/{run.name} (" in done.stdout
    assert f"resuming from step-{step:08d}, step {step}\n" in done.stdout
    assert f"\nfinished at step {step + 3}\n" in done.stdout
    assert sorted(losses(run)) == list(range(1, step + 4))
    outcomes = [json.loads((run / f"attempts/{n}/outcome.json").read_text()) for n in (1, 2)]
    assert [outcome["outcome"] for outcome in outcomes] == ["stopped", "finished"]
    assert json.loads((run / "run.json").read_text())["num_processes"] == 2
    assert ", 2 x CPU," in done.stdout


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["ACCEL=zero9"], "ACCEL=zero9: there is no configs/accelerate/zero9.yaml"),
        (["NPROC=3"], "batch.global_batch_size: 8 sequences do not divide among 3 processes"),
        (["ARGS=--max_step 5"], "--max_step is not a setting; did you mean 'max_steps'?"),
    ],
)
def test_what_is_wrong_is_one_line_and_makes_no_run(
    checkout: Checkout, words: list[str], error: str
) -> None:
    before = set(checkout.folder.glob("runs/*/*"))
    done = checkout.run("make", "dry-run", *words)
    assert done.returncode == 2
    said, of_make = done.stderr.splitlines()
    assert said.startswith("error: ")
    assert error in said
    assert of_make.endswith("Error 2")
    assert set(checkout.folder.glob("runs/*/*")) == before


def test_ctrl_c_before_it_trains_is_answered_in_one_line(
    checkout: Checkout, tmp_path: Path
) -> None:
    pause = Pause(tmp_path, "loaded")
    process = checkout.start("make", "dry-run", **pause.variable)
    pause.wait(lambda: process.poll() is None)
    os.killpg(process.pid, signal.SIGINT)
    pause.go_on()
    done = waiting.finish(process)
    assert done.stdout.endswith("\n\ninterrupted before it could save\n")
    assert "Traceback" not in done.stderr
    run = checkout.folder / re.findall(r"^run folder (\S+) ", done.stdout, re.MULTILINE)[0]
    assert not processes_of(run), "something was left running"
    outcome = json.loads((run / "attempts/1/outcome.json").read_text())
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 130)


def processes_of(run: Path) -> list[str]:
    """Return the command lines of the processes that work on a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode(errors="replace")
        except OSError:
            continue  # it has ended by now
        if str(run) in words:
            found.append(words)
    return found
