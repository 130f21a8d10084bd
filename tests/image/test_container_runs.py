"""Runs in the image, for real: by root and by an ordinary user to whom everything is hostile.

SLUICE_TEST_IMAGE names the image, with its manifest beside it; APPTAINER the command, if need be.
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
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster import image as images
from tests.conftest import losses
from tests.image.accounts import IS_ROOT, ORDINARY, Account, make_account

pytestmark = [pytest.mark.slow, pytest.mark.needs("unshare", "git")]

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
LAUNCHER = """
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
            timeout=240,
        )

    def make(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("make", *words, **environment)

    def runs(self) -> set[Path]:
        return set(Path(self.environment["SLUICE_RUNS"]).glob("*/*"))

    def launcher(self, text: str) -> None:
        path = self.checkout / "slurm/launch.py"
        path.write_text(text)


def user_of(account: Account, image: Path) -> User:
    checkout = account.checkout("my sluice, 1")
    places = {
        f"SLUICE_{name.upper()}": str(account.home / name) for name in ("runs", "datasets", "cache")
    }
    environment = {**places, "SLUICE_IMAGES": str(image.parent), "GIT_CONFIG_GLOBAL": os.devnull}
    if found := images.find_apptainer():
        environment["APPTAINER"] = found
    user = User(account, checkout, environment)
    # With the network, once; what follows has none.
    made = account.run("containers/venv.sh", "--base", cwd=checkout, timeout=240)
    assert made.returncode == 0, made.stderr
    return user


@pytest.fixture(scope="module")
def root(image: Path) -> Iterator[User]:
    """Return root in a container or a restricted shell; where the tests are not root's, nobody."""
    if not IS_ROOT:
        pytest.skip("the tests are not run by root")
    account = make_account("root")
    yield user_of(account, image)
    shutil.rmtree(account.home)


@pytest.fixture(scope="module")
def hostile(image: Path) -> Iterator[User]:
    """Return an ordinary user: home and checkout read-only, traps in the home and the shell."""
    name = ORDINARY if IS_ROOT else pwd.getpwuid(os.geteuid()).pw_name
    if IS_ROOT and subprocess.run(["id", name], capture_output=True, check=False).returncode:
        subprocess.run(["useradd", "--no-create-home", "--shell", "/bin/bash", name], check=True)
    account = make_account(name)
    user = user_of(account, image)
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
def watched(image: Path) -> Iterator[User]:
    """Return a user whose runs only note what they see."""
    account = make_account(ORDINARY if IS_ROOT else pwd.getpwuid(os.geteuid()).pw_name)
    user = user_of(account, image)
    user.launcher(LAUNCHER)
    yield user
    shutil.rmtree(account.home)


def assert_trained(user: User, image: Path, done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0, done.stdout + done.stderr
    # Without a name server torch cannot name its peers; /dev/fuse is this machine's business.
    expected = ("hostname of the client", "note: /dev/fuse is closed")
    lines = done.stderr.splitlines()
    assert not [line for line in lines if not any(part in line for part in expected)]
    assert "\nfinished at step 20\n" in done.stdout
    [(folder, where)] = re.findall(
        r"^run folder (\S+) \((.*)\), attempt 1$", done.stdout, re.MULTILINE
    )
    assert where == f"in {image}"
    record = json.loads((Path(folder) / "run.json").read_text())
    manifest = json.loads(image.with_suffix(".json").read_text())
    assert record["runtime"] == "apptainer"
    assert record["image"] == {"path": str(image), "sha256": manifest["sha256"]}
    assert record["lock_sha256"] == manifest["lock_sha256"]
    for path in (Path(folder), *Path(folder).rglob("*")):
        assert path.lstat().st_uid == user.uid, path
    assert (Path(folder) / "export/model.safetensors").is_file()
    return Path(folder)


# The other strategies, in the image and on two nodes: tests/cluster/test_submit.py.
def test_root_trains_without_a_network(root: User, image: Path) -> None:
    done = root.make("dry-run", "ACCEL=zero3_offload", "RUNTIME=apptainer")
    assert_trained(root, image, done)


# What is hostile is met before a strategy is; DeepSpeed's is the one that would compile something.
def test_an_ordinary_user_trains_where_everything_is_hostile(hostile: User, image: Path) -> None:
    done = hostile.make("dry-run", "ACCEL=zero3", "RUNTIME=apptainer")
    assert_trained(hostile, image, done)


def test_text_and_a_model_come_out_of_the_image_too(hostile: User, image: Path) -> None:
    if not hostile.runs():
        assert_trained(hostile, image, hostile.make("dry-run"))
    text = hostile.make("generate", "RUN=tinyllama", "PROMPT=The cluster")
    assert text.returncode == 0, text.stderr
    assert text.stderr.startswith(f"note: in {image}\n")
    assert text.stdout.startswith("The cluster")
    output = hostile.account.home / "tmp/a model"
    done = hostile.make("export", "RUN=tinyllama", f"ARGS=--output '{output}'")
    assert done.returncode == 0, done.stderr
    assert (output / "model.safetensors").stat().st_uid == hostile.uid


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


def test_a_run_sees_its_own_folders_and_nothing_else_of_the_host(watched: User) -> None:
    planted = {**PLANTED, "OMP_PROC_BIND": "false", "NCCL_DEBUG": "a $HOME `id`"}
    done = watched.make("dry-run", "ARGS=--seed 0", **planted)
    assert done.returncode == 0, done.stderr
    run = max(watched.runs())
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
    assert (run / "made").stat().st_uid == watched.uid


@pytest.mark.parametrize("code", [1, 75, 128 + signal.SIGKILL, 128 + signal.SIGTERM])
def test_the_exit_code_comes_through(watched: User, code: int) -> None:
    # Not by make, which says 2 for all.
    command = [".venv/bin/python", "-m", "cluster.run", "--dry_run", "--", "--seed", str(code)]
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
        command += ["-m", "cluster.run", "--nproc", "2"]
        environment = os.environ | user.environment | {"SLUICE_DEVICE": "cpu"}
        self.master, slave = pty.openpty()

        self.process = subprocess.Popen(
            [*command, "--image", str(image), "--", *SETTINGS],
            cwd=user.checkout,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str) -> None:
        while text not in self.seen:
            self.seen += os.read(self.master, 65536).decode(errors="replace").replace("\r\n", "\n")

    def end(self) -> int:
        """Read to the end; return the exit code."""
        try:
            while data := os.read(self.master, 65536):
                self.seen += data.decode(errors="replace").replace("\r\n", "\n")
        except OSError:
            pass  # the terminal's other side was closed
        os.close(self.master)
        return self.process.wait(timeout=60)

    @property
    def folder(self) -> Path:
        return Path(re.findall(r"^run folder (\S+) ", self.seen, re.MULTILINE)[0])


def below(pid: int) -> dict[int, str]:
    """Return the processes that a process started, and theirs, with their names."""
    children: dict[int, list[tuple[int, str]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = path.read_text().partition(" (")
        except OSError:
            continue  # it has ended by now
        name, _, rest = rest.rpartition(") ")
        if rest[0] != "Z":
            children.setdefault(int(rest.split()[1]), []).append((int(number), name))
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        for child, name in children.get(todo.pop(), []):
            found[child] = name
            todo.append(child)
    return found


def left(processes: dict[int, str]) -> list[int]:
    """Return which of these still run, after the moment that the kernel takes to end them."""
    deadline = time.monotonic() + 3
    alive = list(processes)
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = [pid for pid in alive if _runs(pid)]
    return alive


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "Ctrl+C"])
def test_a_signal_in_a_terminal_saves_first(image: Path, own: User, how: str) -> None:
    run = Terminal(own, image)
    run.wait_for("step     12 ")
    processes = below(run.process.pid)
    if how == "Ctrl+C":
        os.write(run.master, b"\x03")
    else:
        run.process.send_signal(getattr(signal, how))
    assert run.end() == 75, run.seen
    assert "Traceback" not in run.seen
    step = max(losses(run.folder))
    reason = "SIGINT" if how == "Ctrl+C" else how
    assert f"\nstopped at step {step} ({reason}), saved\n" in run.seen
    assert (run.folder / "checkpoints/latest").read_text() == f"step-{step:08d}\n"
    assert not left(processes)


def test_with_apptainer_killed_nothing_goes_on_unseen(image: Path, own: User) -> None:
    run = Terminal(own, image)
    # Saving step 20 waits for the checkpoint of step 10.
    run.wait_for("step     22 ")
    processes = below(run.process.pid)
    launched = [pid for pid, name in processes.items() if name.startswith(("apptainer", "starter"))]
    assert launched, processes
    os.kill(launched[0], signal.SIGKILL)
    assert run.end() == 128 + signal.SIGKILL, run.seen
    assert "continue from the last checkpoint with" in run.seen
    # What serves the files of the image is Apptainer's; it outlives it, idle.
    for pid in left(processes):
        assert processes[pid].startswith("squashfuse"), processes[pid]
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def own(image: Path) -> Iterator[User]:
    """Return who runs the tests, with the checkout's own environment."""
    account = make_account(pwd.getpwuid(os.geteuid()).pw_name)
    yield user_of(account, image)
    shutil.rmtree(account.home)


# ---- refusals ----


def test_an_image_without_a_signature_or_of_another_signer_starts_nothing(
    watched: User, image: Path
) -> None:
    keys = watched.account.home / "keys"
    keys.mkdir()
    signed = watched.account.home / "signed images"
    signed.mkdir()
    for file in (image, image.with_suffix(".json")):
        shutil.copyfile(file, signed / file.name)
    for name in ("ours", "theirs"):
        private, public = keys / f"{name}.pem", keys / f"{name}.pub"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    watched.account.own(keys)
    watched.account.own(signed)
    before = watched.runs()
    file = signed / image.name
    place = {"SLUICE_IMAGES": str(signed), "SLUICE_VERIFY_KEY": str(keys / "ours.pub")}
    words = ["dry-run", f"IMAGE={file}", "ARGS=--seed 0"]

    done = watched.make(*words, **place)
    assert done.returncode == 2
    assert "does not vouch for it" in done.stderr
    assert watched.make("verify-image", f"IMAGE={file}", **place).returncode == 2
    theirs = watched.make("sign-image", f"IMAGE={file}", f"KEY={keys / 'theirs.pem'}", **place)
    assert theirs.returncode == 0, theirs.stderr
    assert "the key theirs.pem signed" in watched.make(*words, **place).stderr
    assert watched.runs() == before

    done = watched.make("sign-image", f"IMAGE={file}", f"KEY={keys / 'ours.pem'}", **place)
    assert done.returncode == 0, done.stderr
    done = watched.make("verify-image", f"IMAGE={file}", **place)
    assert (done.returncode, done.stderr) == (0, "")
    assert "vouches for it" in done.stdout

    # One byte of the packed files, far from any header.
    with file.open("r+b") as stream:
        stream.seek(-1_000_000, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    done = watched.make(*words, **place)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2, "the error, and make's own line"
    assert "its bytes are not those of its manifest" in done.stderr
    assert watched.runs() == before
