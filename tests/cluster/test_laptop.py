"""Commands that are given on a laptop, which has no Slurm, and reach the cluster over SSH alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.sync import Parcel
from tests.cluster.desk import SECRET, Run
from tests.cluster.local import LOCAL, Cluster, Result, wait_until
from tests.conftest import CHECKOUT, free_port
from tests.image.accounts import IS_ROOT, lay_out

pytestmark = [pytest.mark.needs("slurm"), pytest.mark.needs("unshare"), pytest.mark.timeout(600)]
LOCKS = CHECKOUT / "containers/locks"
SLURM = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacctmgr", "srun", "sshare")
SITE = """
[slurm]
partition = "gpu"
cpus_per_node = 4
gpus_per_node = 2
save_s = 20
[paths]
scratch = "/var/tmp"
datasets = "{there}/data"
[container]
variant = "cpu"
[ssh]
host = "login"
config = "{config}"
folder = "{there}"
backend = "{backend}"
"""


@dataclass(frozen=True)
class Laptop:
    """A checkout on a machine without Slurm, and Sluice's folder on the cluster."""

    cluster: Cluster
    checkout: Path
    there: Path
    environment: dict[str, str]

    def use(self, backend: str = "paramiko", **changes: str) -> None:
        """Write site.toml."""
        config = self.cluster.folder / "ssh/client_config"
        values = {"there": str(self.there), "config": str(config), "backend": backend} | changes
        (self.checkout / "site.toml").write_text(SITE.format(**values))

    def words(self, *command: str) -> list[str]:
        """Return a command line that runs a command where Slurm's commands are not."""
        hide = "; ".join(f'mount --bind /dev/null "$(command -v {name})"' for name in SLURM)
        user = [] if IS_ROOT else ["--map-root-user"]
        return ["unshare", *user, "--mount", "sh", "-ec", f'{hide}; exec "$@"', "-", *command]

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command that goes on by itself, in a group of its own."""
        return subprocess.Popen(
            self.words(*command),
            cwd=self.checkout,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def make(self, *words: str, timeout: float = 200) -> Result:
        """Run make; a command signs in once."""
        before = self.sign_ins()
        done = subprocess.run(
            self.words("make", "--no-print-directory", *words),
            check=False,
            cwd=self.checkout,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert self.sign_ins() - before <= 1
        return done

    def output(self, *words: str) -> str:
        """Return what make said that had to succeed, with one sign-in."""
        before = self.sign_ins()
        done = self.make(*words)
        assert done.returncode == 0, done.stderr + done.stdout
        assert self.sign_ins() - before == 1
        return done.stdout

    def sign_ins(self) -> int:
        """How often sshd has let somebody in."""
        return (self.cluster.folder / "log/door.log").read_text().count("Accepted ")

    def checkouts(self) -> list[Path]:
        """What is whole on the cluster."""
        found = (self.there / "checkouts").glob("?" * 16)
        return sorted(found, key=lambda path: path.stat().st_mtime)

    def jobs(self) -> str:
        """What is queued."""
        return self.cluster.output("squeue", "--noheader", "-o", "%i")


@pytest.fixture(scope="module")
def laptop(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """A laptop with a clone of its own; the environment on the cluster is there already."""
    folder = tmp_path_factory.mktemp("laptop")
    lay_out(folder / "clone")
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=x"]):
        name = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *name, *words], cwd=folder / "clone", check=True)
    there = folder / "there"
    there.mkdir()
    locks = {str(path.relative_to(CHECKOUT)): path.read_bytes() for path in LOCKS.glob("*.txt")}
    environments = there / "environments"
    environments.mkdir()
    name = Parcel(contents=locks, executable=frozenset()).environment
    (environments / name).symlink_to(sys.prefix)
    kept = {k: v for k, v in cluster.environment.items() if k != "SLUICE_CLUSTER"}
    environment = kept | {"VENV": sys.prefix, "HF_TOKEN": SECRET, "GIT_CONFIG_GLOBAL": "/dev/null"}
    # A home of its own on the login node: what this machine's user has in .bashrc is not ours.
    settings = cluster.folder / "ssh/sshd_config"
    before = settings.read_text()
    settings.write_text(before.replace("SetEnv ", f"SetEnv HOME={folder} ", 1))
    yield Laptop(cluster, folder / "clone", there, environment)
    settings.write_text(before)


@pytest.fixture(params=["paramiko", "openssh"])
def either(laptop: Laptop, request: pytest.FixtureRequest) -> Laptop:
    """The laptop, with each of the two backends."""
    laptop.use(request.param)
    return laptop


@pytest.fixture(scope="module")
def with_image(laptop: Laptop, image: Path, apptainer: str) -> Laptop:
    """The laptop, where the cluster has an image."""
    (laptop.there / "images").mkdir(exist_ok=True)
    for file in (image, image.with_suffix(".json")):
        (laptop.there / "images" / file.name).symlink_to(file)
    (laptop.there / ".apptainer").symlink_to(Path(apptainer).parent.parent)
    return laptop


@pytest.mark.needs("apptainer")
@pytest.mark.slow
def test_a_job_is_planned_submitted_followed_and_looked_at_with_one_sign_in_each(
    with_image: Laptop,
) -> None:
    laptop = with_image
    laptop.use("openssh")
    plan = laptop.output("submit", "NODES=2", "ARGS=--dry_run", "PLAN=1")
    assert "nothing was queued or written" in plan
    laptop.use()
    said = laptop.output("submit", "NODES=2", "ARGS=--dry_run")
    found = re.search(r"make logs RUN=(\S+)", said)
    assert found
    run = Run(laptop.there / "runs" / found[1])
    followed = laptop.output("logs", f"RUN={found[1]}")
    assert "step     20" in followed
    assert "---- finished" in followed
    rows = json.loads(laptop.output("status", "FORMAT=json"))["runs"]
    assert [row["state"] for row in rows if row["run"] == found[1]] == ["finished"]
    record = json.loads((run.folder / "run.json").read_text())
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=laptop.checkout, capture_output=True, check=True
    )
    assert record["git_commit"] == head.stdout.decode().strip()
    assert (run.folder / "code/train/tinyllama.py").exists()
    assert not (run.folder / "code/site.toml").exists()
    assert not any(
        SECRET in path.read_text(errors="replace")
        for path in run.folder.rglob("*")
        if path.is_file() and path.suffix != ".py"
    )


@pytest.mark.needs("apptainer")
@pytest.mark.slow
def test_a_job_is_cancelled_and_its_curves_are_shown_before(with_image: Laptop) -> None:
    laptop = with_image
    laptop.use()
    said = laptop.output("submit", "NODES=2", "ARGS=--dry_run --max_steps 5000")
    found = re.search(r"make logs RUN=(\S+)", said)
    assert found
    run = Run(laptop.there / "runs" / found[1])
    wait_until(lambda: any(run.folder.glob("tensorboard/events.*")), 90, "a curve")
    # Whoever stops looking leaves nothing behind there, and the job goes on.
    following = laptop.start("make", "--no-print-directory", "logs", f"RUN={found[1]}")
    assert following.stdout is not None
    while "step " not in following.stdout.readline():
        assert following.poll() is None
    assert running_there("cluster.jobs", "logs", found[1])
    os.killpg(following.pid, signal.SIGINT)
    following.communicate(timeout=60)
    over = "the end of make logs there"
    wait_until(lambda: not running_there("cluster.jobs", "logs", found[1]), 30, over)
    assert laptop.cluster.state_of(run.job_id) == "RUNNING"
    port = free_port()
    with tunnel(laptop, f"RUN={found[1]}", f"PORT={port}") as words:
        assert f"http://127.0.0.1:{port} leads to 10." in words
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=60) as answer:
            assert json.load(answer) == ["."]
        steps = laptop.cluster.output("squeue", "--steps", "--noheader", "-o", "%j %N")
        assert "board.sh node1" in steps
    wait_until(lambda: "board.sh" not in laptop.cluster.output("squeue", "--steps"), 30, "its end")
    assert "is cancelled; continue with make submit" in laptop.output("cancel", f"RUN={found[1]}")
    assert (run.folder / "checkpoints/latest").exists()
    # When it is over, the curves are shown from the login node.
    with tunnel(laptop, f"RUN={found[1]}", f"PORT={port}") as words:
        assert f"http://127.0.0.1:{port} leads to 127.0.0.1:" in words
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=60) as answer:
            assert json.load(answer) == ["."]
    # One that ends by itself ends the tunnel.
    words = ("make", "--no-print-directory", "tunnel", f"RUN={found[1]}", f"PORT={port}")
    process = laptop.start(*words)
    assert process.stdout is not None
    assert "leads to" in process.stdout.readline()
    subprocess.run(["pkill", "-f", "tensorboard.main --logdir .* --host 127.0.0.1"], check=True)
    _, errors = process.communicate(timeout=60)
    assert "has ended" in errors
    assert process.returncode == 2


def running_there(*words: str) -> bool:
    """Return whether a process that came from a laptop has all of these among its words."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
            arrived = b"SLUICE_ARRIVED=1" in path.with_name("environ").read_bytes().split(b"\0")
        except OSError:
            # It has just ended.
            continue
        if arrived and all(word.encode() in line for word in words):
            return True
    return False


@contextmanager
def tunnel(laptop: Laptop, *words: str) -> Iterator[str]:
    """Run `make tunnel`, as far as its first line, until Ctrl+C."""
    process = laptop.start("make", "--no-print-directory", "tunnel", *words)
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield line
    finally:
        os.killpg(process.pid, signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert "Traceback" not in out + errors


def test_a_tunnel_leads_to_any_port_of_a_node_and_to_nobody_else(either: Laptop) -> None:
    # What it sends back is what it got: a megabyte, of which nothing may be lost.
    echo = (
        "import socket; s = socket.create_server(('', 8765)); c = s.accept()[0]; "
        "c.sendall(b''.join(iter(lambda: c.recv(65536), b''))); c.close()"
    )
    words = [sys.executable, "-c", echo]
    server = subprocess.Popen(
        [LOCAL / "exec.sh", "--node", "node1", "--", *words], env=either.cluster.environment
    )
    data = os.urandom(1 << 20)
    try:
        with tunnel(either, "NODE=node1", "PORT=8765") as line:
            assert "http://127.0.0.1:8765 leads to node1:8765" in line
            addresses = subprocess.run(
                ["ss", "-Hltn", "sport = :8765"], capture_output=True, check=True, text=True
            )
            assert re.findall(r"(\S+):8765", addresses.stdout) == ["127.0.0.1"]
            assert exchanged(8765, data, either) == data
    finally:
        server.kill()
        server.wait()


def exchanged(port: int, data: bytes, laptop: Laptop) -> bytes:
    """Return what comes back through a tunnel."""

    def listening() -> bool:
        done = laptop.cluster.run("ss", "-Hltn", "sport = :8765", node="node1")
        return "8765" in done.stdout

    wait_until(listening, 20, "the server on the node")
    with socket.create_connection(("127.0.0.1", port), timeout=30) as stream:
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: stream.recv(65536), b""))


def test_the_cluster_and_a_job_are_checked_from_afar(either: Laptop) -> None:
    assert re.search(r"(?m)^gpu\* +UP ", either.output("check"))
    assert "tinyllama: fits now" in either.output("check", "JOB=tinyllama", "NODES=2")
    never = either.make("check", "JOB=tinyllama", "NODES=9")
    assert never.returncode == 2
    assert "fits:  NODES=2" in never.stdout


def test_what_a_tunnel_cannot_lead_to_is_said(laptop: Laptop) -> None:
    laptop.use()
    port = free_port()
    process = laptop.start("make", "--no-print-directory", "tunnel", "NODE=node2", f"PORT={port}")
    assert process.stdout is not None and process.stderr is not None
    assert "leads to" in process.stdout.readline()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as stream:
        assert stream.recv(1) == b""
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert f"error: node2:{port}: nothing takes connections at port {port} of node2" in errors


def refused(done: Result) -> str:
    """Return the one line of a refusal."""
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    # What make adds, and what is said of the transfer.
    lines = [x for x in lines if not x.startswith("make: ***") and " files to " not in x]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_bad_input_is_refused_on_the_laptop(laptop: Laptop) -> None:
    laptop.use()
    before, signed_in = laptop.jobs(), laptop.sign_ins()
    for words, said in (
        (("tunnel",), "give RUN= for the TensorBoard of a run, or NODE= and PORT="),
        (("tunnel", "NODE=node1"), "PORT= is missing"),
        (("tunnel", "NODE=-oProxyCommand=x", "PORT=80"), "is not the name of a node"),
        (("tunnel", "NODE=node1", "PORT=99999"), "PORT=99999: is not a port"),
    ):
        assert said in refused(laptop.make(*words))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ("tunnel", "NODE=node1", f"PORT={port}")
        assert f"PORT={port}: cannot be used on this machine" in refused(laptop.make(*words))
    assert laptop.sign_ins() == signed_in
    assert laptop.jobs() == before


def test_bad_input_is_refused_from_afar(either: Laptop) -> None:
    before = either.jobs()
    for words, said in (
        (("logs", "RUN=nothing"), "RUN=nothing: there is no such run"),
        (("submit", "JOB=nothing"), "JOB=nothing: there is no configs/jobs/nothing.yaml"),
        (("submit", "NODES=x"), "NODES=x: is not a whole number"),
        (("tunnel", "RUN=nothing", f"PORT={free_port()}"), "RUN=nothing: there is no such run"),
    ):
        done = either.make(*words)
        assert said in refused(done)
    assert either.jobs() == before


def test_a_folder_that_cannot_be_written_is_said(either: Laptop) -> None:
    site = either.checkout / "site.toml"
    site.write_text(
        site.read_text().replace(f'folder = "{either.there}"', 'folder = "/proc/sluice"')
    )
    said = refused(either.make("status"))
    assert re.search(r"error: login: .*/proc/sluice.*No such file or directory", said)


def test_the_checkout_is_brought_once_whole_without_secrets_and_what_git_ignores(
    either: Laptop,
) -> None:
    clone = either.checkout
    (clone / "train/new.py").write_text(f"# {time.time()}\n")
    (clone / "README.md").write_text("edited")
    (clone / ".env").write_text(SECRET)
    (clone / "runs/x").mkdir(parents=True, exist_ok=True)
    (clone / "runs/x/big").write_text("x")
    (clone / "slurm/odd name!.sh").write_text("x")
    (clone / "slurm/odd name!.sh").chmod(0o755)
    first, second = either.make("status"), either.make("status")
    assert (first.returncode, second.returncode) == (0, 0)
    assert " files to " in first.stderr
    assert " files to " not in second.stderr
    found = either.checkouts()[-1]
    for path in clone.rglob("*"):
        name = path.relative_to(clone)
        if name.parts[0] in (".git", "runs", ".env") or path.is_dir():
            continue
        assert (found / name).read_bytes() == path.read_bytes(), name
        assert (found / name).stat().st_mode & 0o100 == path.stat().st_mode & 0o100, name
    assert (either.there / "current").resolve() == found
    assert not (found / ".env").exists()
    assert not (found / "runs/x").exists()
    assert (found / "runs").resolve() == either.there / "runs"
    # Where the site has a place of its own, there is none of ours.
    assert not (found / "datasets").exists()
    origin = json.loads((found / ".origin.json").read_text())
    assert len(origin["git_commit"]) == 40
    assert b"+edited" in (found / ".origin.diff").read_bytes()


def test_what_was_changed_there_is_kept_and_not_run(laptop: Laptop) -> None:
    laptop.use()
    (laptop.checkout / "train/new.py").write_text(f"# {time.time()}\n")
    laptop.output("status")
    (laptop.there / "current/train/new.py").write_text("changed by hand")
    (laptop.there / "current/README.md").unlink()
    done = laptop.make("status")
    assert done.returncode == 0
    kept = re.search(r"note: (\S+) was changed there, and is kept as (\S+)", done.stderr)
    assert kept, done.stderr
    assert Path(kept[2], "train/new.py").read_text() == "changed by hand"
    here = laptop.checkout
    assert Path(kept[1], "train/new.py").read_bytes() == (here / "train/new.py").read_bytes()
    assert Path(kept[1], "README.md").exists()


def test_two_first_commands_at_once_have_one_checkout_that_is_whole(laptop: Laptop) -> None:
    laptop.use()
    before = set(laptop.checkouts())
    (laptop.checkout / "train/new.py").write_text(f"# {time.time()}\n")
    both = [laptop.start("make", "status") for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    (new,) = set(laptop.checkouts()) - before
    assert (new / "train/new.py").read_bytes() == (laptop.checkout / "train/new.py").read_bytes()


def test_old_checkouts_go_and_nothing_else_does(laptop: Laptop) -> None:
    laptop.use()
    mine = laptop.there / "checkouts/mine"
    mine.mkdir(exist_ok=True)
    for number in range(12):
        old = laptop.there / f"checkouts/{number:016x}"
        old.mkdir()
        os.utime(old, (number, number))
    (laptop.checkout / "train/new.py").write_text(f"# {time.time()}\n")
    laptop.output("status")
    assert len(laptop.checkouts()) == 10
    assert mine.is_dir()


def test_a_transfer_that_was_cut_off_leaves_nothing_to_run_and_goes_on(either: Laptop) -> None:
    big = either.checkout / "big"
    big.write_bytes(os.urandom(15_000_000))
    subprocess.run(["git", "add", "big"], cwd=either.checkout, check=True)
    for left in either.there.glob("checkouts/.*.partial"):
        shutil.rmtree(left)
    try:
        jobs, whole = either.jobs(), either.checkouts()
        process = either.start("make", "submit", "NODES=2", "ARGS=--dry_run")
        wait_until(lambda: arrived(either) > 1_000_000, 60, "a part of the transfer")
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert either.checkouts() == whole
        assert either.jobs() == jobs
        said = either.make("status").stderr
        found = re.search(r"(\d+) of (\d+) files to ", said)
        assert found, said
        assert int(found[1]) < int(found[2])
        (new,) = set(either.checkouts()) - set(whole)
        assert (new / "big").read_bytes() == big.read_bytes()
    finally:
        subprocess.run(["git", "rm", "--quiet", "--cached", "big"], cwd=either.checkout, check=True)
        big.unlink()


def arrived(laptop: Laptop) -> int:
    """How much of the large file has come."""
    return sum(path.stat().st_size for path in laptop.there.glob("checkouts/.*.partial/big"))
