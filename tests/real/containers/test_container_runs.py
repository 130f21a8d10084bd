"""Runs in the image, for real: by root and by an ordinary user to whom everything is hostile.

What training itself does is shown once here, and by jobs in tests/real/slurm; what the container
lets in and out is shown by stand-ins for the launcher, which start in a moment. SLUICE_TEST_IMAGE
names the image, with its manifest beside it; APPTAINER the command, if need be.
"""

from __future__ import annotations

import json
import os
import pty
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.plan.apptainer import find_apptainer
from tests.conftest import losses
from tests.real.accounts import IS_ROOT, Account, make_account
from tests.waiting import HANGS_AFTER_S, descendants, wait_until

pytestmark = pytest.mark.needs("unshare", "git", "apptainer")

PLANTED = {
    "APPTAINERENV_PYTHONPATH": "/planted",
    "SINGULARITYENV_PLANTED": "1",
    "APPTAINER_BIND": "/etc/passwd:/workspace/planted",
    "PYTHONPATH": "/planted",
    "HF_TOKEN": "a secret",
    "PLANTED": "1",
}

# A loopback interface and nothing that leads outside; then the command as the user that it was.
WITHOUT_NETWORK = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 1))
    try:
        control.connect(("192.0.2.1", 9))
    except OSError:
        os.execvp(sys.argv[1], sys.argv[1:])
sys.exit("the network is not cut")
"""

# Stands in for the launcher: notes what a run sees, and ends as the seed says.
NOTES = """
import json, os, re, sys
from pathlib import Path
def attempt(path):
    try:
        (Path(path) / "made").touch()
        return True
    except OSError:
        return False
seen = {
    "environment": dict(os.environ), "folder": os.getcwd(), "words": sys.argv[1:],
    "home": os.listdir(Path.home()), "tmp": os.listdir("/tmp"), "homes": os.listdir("/home"),
    "terminal": [os.isatty(number) for number in range(3)],
    "writable": {path: attempt(path) for path in
                 ("/workspace", "/datasets", "/run-folder", "/tmp", Path.home().as_posix())},
    "shm": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
    "umask": os.umask(0),
}
Path("/run-folder/seen.json").write_text(json.dumps(seen))
code = int(re.findall(r"^seed: (\\d+)$", Path("/run-folder/config.yaml").read_text(), re.M)[0])
if code > 128:
    os.kill(os.getpid(), code - 128)
sys.exit(code)
"""

# Stands in for the launcher: says which signals arrive, and goes on.
LISTENS = """
import signal
numbers = {signal.SIGUSR1, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
print("listens", flush=True)
while True:
    print("got", signal.Signals(signal.sigwait(numbers)).name, flush=True)
"""


@dataclass
class User:
    """An account with a checkout, the light environment, and places of its own."""

    account: Account
    checkout: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def uid(self) -> int:
        return pwd.getpwnam(self.account.name).pw_uid

    def command(self, *words: str) -> list[str]:
        """Return `words` with the network cut, run as the user all the same."""
        cut = ["unshare", "--map-root-user", "--net", "/usr/bin/python3", "-c", WITHOUT_NETWORK]
        same = ["unshare", f"--map-user={self.uid}", f"--map-group={self.uid}", "--"]
        return [*cut, *(same if self.uid else []), *words]

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.account.run(
            *self.command(*words),
            cwd=self.checkout,
            environment=self.environment | environment,
        )

    def make(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("make", *words, **environment)

    def runs(self) -> set[Path]:
        return set(Path(self.environment["SLUICE_RUNS"]).glob("*/*"))

    @contextmanager
    def launcher(self, text: str) -> Iterator[None]:
        """Have the runs that begin here start `text`."""
        path = self.checkout / "slurm/launch.py"
        real = path.read_text()
        path.write_text(text)
        yield
        path.write_text(real)


def user_of(account: Account, image: Path, environment_of: Path) -> User:
    """Return a user whose .venv is that of another checkout."""
    checkout = account.checkout("my sluice, 1")
    (checkout / ".venv").symlink_to(environment_of / ".venv")
    places = {
        f"SLUICE_{name.upper()}": str(account.home / name) for name in ("runs", "datasets", "cache")
    }
    environment = {**places, "SLUICE_IMAGES": str(image.parent), "GIT_CONFIG_GLOBAL": os.devnull}
    if found := find_apptainer():
        environment["APPTAINER"] = found
    return User(account, checkout, environment)


@pytest.fixture(scope="module")
def own(image: Path, builder_checkout: Path) -> Iterator[User]:
    """Return who runs the tests: root in a container or a restricted shell, for one."""
    account = make_account(pwd.getpwuid(os.geteuid()).pw_name)
    yield user_of(account, image, builder_checkout)
    shutil.rmtree(account.home)


@pytest.fixture(scope="module")
def hostile(ordinary_user: str, image: Path, builder_checkout: Path) -> Iterator[User]:
    """Return an ordinary user: home and checkout read-only, traps in the home and the shell."""
    account = make_account(ordinary_user)
    user = user_of(account, image, builder_checkout)
    environment = user.checkout / ".venv"
    environment.unlink()
    shutil.copytree(builder_checkout / ".venv", environment, symlinks=True)
    home = account.home / "home"
    trap = home / ".local/lib/python3.11/site-packages/torch/__init__.py"
    trap.parent.mkdir(parents=True)
    trap.write_text("raise ImportError('the torch of ~/.local')\n")
    (home / "private").write_text("private\n")
    (account.home / "tmp").mkdir(exist_ok=True)
    account.own(account.home / "tmp")
    closed = [home, user.checkout]
    for folder in closed:
        if IS_ROOT:
            subprocess.run(["chown", "-R", "root", folder], check=True)
        subprocess.run(["chmod", "-R", "a+rX,a-w", folder], check=True)
    user.environment |= {"HOME": str(home), "LD_PRELOAD": "libm.so.6", **PLANTED}
    yield user
    for folder in closed:
        subprocess.run(["chmod", "-R", "u+w", folder], check=True)
    shutil.rmtree(account.home)


@pytest.fixture(scope="module")
def watched(ordinary_user: str, image: Path, builder_checkout: Path) -> Iterator[User]:
    """Return an ordinary user whose runs only note what they see."""
    account = make_account(ordinary_user)
    user = user_of(account, image, builder_checkout)
    with user.launcher(NOTES):
        yield user
    shutil.rmtree(account.home)


# ---- a whole run ----


def assert_trained(user: User, image: Path, done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0, done.stdout + done.stderr
    # Without a name server torch cannot name its peers; /dev/fuse is this machine's business.
    expected = ("hostname of the client", "note: no access to /dev/fuse")
    lines = done.stderr.splitlines()
    assert not [line for line in lines if not any(part in line for part in expected)]
    assert "\nfinished at step 20\n" in done.stdout
    [(folder, where)] = re.findall(
        r"^run folder (\S+) \((.*)\), attempt 1$", done.stdout, re.MULTILINE
    )
    assert where == f"in {image}"
    assert (Path(folder) / "export/model.safetensors").is_file()
    return Path(folder)


def assert_recorded(user: User, image: Path, folder: Path) -> None:
    """Check that a run's folder names the image and is the user's, all of it."""
    record = json.loads((folder / "run.json").read_text())
    manifest = json.loads(image.with_suffix(".json").read_text())
    assert record["runtime"] == "apptainer"
    assert record["image"] == {"path": str(image), "sha256": manifest["sha256"]}
    assert record["lock_sha256"] == manifest["lock_sha256"]
    assert record["extra_packages"] == manifest.get("extra_packages", {})
    for path in (folder, *folder.rglob("*")):
        assert path.lstat().st_uid == user.uid, path


# The other strategies, in the image and on two nodes, by root: tests/real/slurm. What is hostile is
# met before a strategy is; DeepSpeed's is the one that would compile something.
@pytest.mark.computes(2)
def test_an_ordinary_user_trains_and_uses_the_model_where_everything_is_hostile(
    hostile: User, image: Path
) -> None:
    done = hostile.make("dry-run", "ACCEL=zero3", "RUNTIME=apptainer")
    assert_recorded(hostile, image, assert_trained(hostile, image, done))
    text = hostile.make("generate", "RUN=tinyllama", "PROMPT=The cluster")
    assert text.returncode == 0, text.stderr
    assert text.stderr.startswith(f"note: in {image}\n")
    assert text.stdout.startswith("The cluster")
    output = hostile.account.home / "tmp/a model"
    done = hostile.make("export", "RUN=tinyllama", f"ARGS=--output '{output}'")
    assert done.returncode == 0, done.stderr
    assert (output / "model.safetensors").stat().st_uid == hostile.uid


# ---- what a run sees, and what comes of it ----


def test_a_text_of_ones_own_is_found_by_its_path_here(watched: User) -> None:
    home, checkout = watched.account.home, watched.checkout
    (home / "text, mine").mkdir()
    sample = (checkout / "train/samples/train.txt").read_text()
    (home / "text, mine/train.txt").write_text(sample + "once more\n")
    (checkout / "validation.txt").symlink_to(home / "text, mine/train.txt")
    words = f"--data.train '{home}/text, mine/train.txt' --data.validation=validation.txt --seed 0"
    done = watched.make("dry-run", f"ARGS={words}")
    assert done.returncode == 0, done.stderr
    config = (max(watched.runs()) / "config.yaml").read_text()
    assert f"train: {home}/text, mine/train.txt" in config
    # By the same path, so that on the host the same packed text serves.
    packed = set((home / "datasets/packed").iterdir())
    done = watched.make("dry-run", f"ARGS={words.replace('mine/train', 'mine/absent')}")
    assert done.returncode == 2
    assert "absent.txt" in done.stderr.splitlines()[0]
    assert set((home / "datasets/packed").iterdir()) == packed


def test_a_run_sees_its_own_folders_and_nothing_else_of_the_host(
    watched: User, image: Path
) -> None:
    assert_that_it_sees_only_its_own(watched, image)


def test_a_run_of_roots_sees_no_more(own: User, image: Path) -> None:
    with own.launcher(NOTES):
        assert_that_it_sees_only_its_own(own, image)


def assert_that_it_sees_only_its_own(user: User, image: Path) -> None:
    planted = {**PLANTED, "OMP_PROC_BIND": "false", "NCCL_DEBUG": "a $HOME `id`"}
    done = user.make("dry-run", "ARGS=--seed 0", **planted)
    assert done.returncode == 0, done.stderr
    run = max(user.runs())
    assert_recorded(user, image, run)
    seen = json.loads((run / "seen.json").read_text())
    environment = seen["environment"]
    assert environment["NCCL_DEBUG"] == "a $HOME `id`"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    expected = {"SLUICE_RUN_FOLDER": "/run-folder", "SLUICE_DATASETS": "/datasets"}
    expected |= {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1", "TRITON_CACHE_DIR": "/tmp/triton"}
    assert {name: environment.get(name) for name in expected} == expected
    assert not [name for name in environment if "PLANTED" in name]
    assert not {"PYTHONPATH", "HF_TOKEN", "GIT_CONFIG_GLOBAL", "SLUICE_IMAGES"} & set(environment)
    assert "a secret" not in json.dumps(environment)
    assert not (run / "code/planted").exists()
    assert seen["folder"] == "/workspace"
    assert seen["words"][-2:] == ["--config", "/run-folder/config.yaml"]
    assert (seen["home"], seen["homes"]) == ([], [])
    assert sorted(seen["tmp"]) == ["apptainer", "home"]
    assert seen["terminal"] == [False, False, False]
    assert {path for path, could in seen["writable"].items() if could} == {
        *("/run-folder", "/tmp", environment["HOME"])
    }
    assert seen["shm"] > 100_000_000
    assert (run / "made").exists()


@pytest.mark.parametrize("code", [75, 128 + signal.SIGKILL])
def test_the_exit_code_comes_through(watched: User, code: int) -> None:
    # Not by make, which says 2 for all.
    command = [".venv/bin/python", "-m", "cluster", "run", "--dry_run", "--", "--seed", str(code)]
    assert watched.run(*command).returncode == code


# ---- signals ----

SETTINGS = [
    *("--model.preset", "tiny", "--data.sequence_length", "32", "--batch.global_batch_size", "4"),
    *("--data.train", "train/samples/train.txt", "--optimizer.lr", "1e-3", "--export", "false"),
    *("--data.validation", "train/samples/validation.txt", "--evaluation.max_tokens", "64"),
    *("--log_every_steps", "1", "--max_steps", "5000", "--checkpoint.every_steps", "10"),
]


class Terminal:
    """A run of whoever runs the tests, in a terminal."""

    def __init__(self, user: User, image: Path) -> None:
        # setsid makes the terminal that of the run, so that Ctrl+C reaches it.
        command = ["setsid", "--ctty", str(user.checkout / ".venv/bin/python")]
        command += ["-m", "cluster", "run", "--nproc", "2"]
        environment = os.environ | user.environment | {"SLUICE_DEVICE": "cpu"}
        self.master, slave = pty.openpty()

        self.process = subprocess.Popen(
            [*command, "--image", str(image), "--", *SETTINGS],
            cwd=user.checkout,
            env=environment | {"PYTHONFAULTHANDLER": "1"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.seen = ""

    def see(self, data: bytes) -> None:
        # Together with what came before: a line's end may come in two parts.
        self.seen = (self.seen + data.decode(errors="replace")).replace("\r\n", "\n")

    def wait_for(self, text: str) -> None:
        while text not in self.seen:
            self.see(os.read(self.master, 65536))

    def end(self) -> int:
        """Read to the end; return the exit code."""
        try:
            while data := os.read(self.master, 65536):
                self.see(data)
        except OSError:
            pass  # the terminal's other side was closed
        os.close(self.master)
        return self.process.wait(timeout=HANGS_AFTER_S)

    @property
    def folder(self) -> Path:
        return Path(re.findall(r"^run folder (\S+) ", self.seen, re.MULTILINE)[0])


def started_by(pid: int) -> dict[int, tuple[str, str]]:
    """Return the processes below one: the name of each, and when it began."""
    return {found: (name, began(found)) for found, name in descendants(pid).items()}


def running(processes: dict[int, tuple[str, str]]) -> dict[int, str]:
    """Return which of these still run; a number may be another process's by now."""
    return {pid: name for pid, (name, at) in processes.items() if at and began(pid) == at}


def began(pid: int) -> str:
    """Return when a process began, in ticks; nothing if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return fields[18] if state != "Z" else ""


@pytest.mark.computes(2)
def test_ctrl_c_in_a_terminal_saves_first(image: Path, own: User) -> None:
    run = Terminal(own, image)
    run.wait_for("step     12 ")
    processes = started_by(run.process.pid)
    os.write(run.master, b"\x03")
    assert run.end() == 75, run.seen
    assert "Traceback" not in run.seen
    step = max(losses(run.folder))
    assert f"\nstopped at step {step} (SIGINT), saved\n" in run.seen
    assert (run.folder / "checkpoints/latest").read_text() == f"step-{step:08d}\n"
    wait_until(lambda: not running(processes), "the end of all that was started")


# What the launcher does when they arrive, and that its processes end with it, is shown in
# tests/real/train/test_faults.py.
def test_signals_reach_the_launcher_and_with_apptainer_killed_nothing_goes_on_unseen(
    image: Path, own: User
) -> None:
    with own.launcher(LISTENS):
        run = Terminal(own, image)
        run.wait_for("listens\n")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        run.process.send_signal(number)
        run.wait_for(f"got {number.name}\n")
    processes = started_by(run.process.pid)
    names = {pid: name for pid, (name, _) in processes.items()}
    assert "python" in names.values(), names
    launched = [pid for pid, name in names.items() if name.startswith(("apptainer", "starter"))]
    os.kill(launched[0], signal.SIGKILL)
    assert run.end() == 128 + signal.SIGKILL, run.seen

    # What serves the files of the image is Apptainer's; it outlives it, idle.
    def others() -> dict[int, str]:
        left = running(processes)
        return {pid: name for pid, name in left.items() if not name.startswith("squashfuse")}

    wait_until(lambda: not others(), "the end of all that ran in the image")
    for pid in running(processes):
        # It ends by itself, too.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
