"""Commands that are given on a laptop, which has no Slurm, and reach the cluster over SSH alone."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.commands import tunnel as tunnel_command
from cluster.remote.sync import Parcel
from tests import waiting
from tests.checkout import lay_out, rewrite
from tests.fast import command
from tests.moments import Pause
from tests.real.accounts import IS_ROOT
from tests.real.desk import SECRET, Desk, Run, paused, processes
from tests.real.private_slurm import LOCAL, Cluster, Result
from tests.shared import CHECKOUT, free_port
from tests.waiting import HANGS_AFTER_S, wait_until

pytestmark = [pytest.mark.needs("slurm"), pytest.mark.needs("unshare")]
LOCKS = CHECKOUT / "containers/locks"
SLURM = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacctmgr", "srun", "sshare")
SITE = """
[slurm]
partition = "gpu"
cpus_per_node = 4
gpus_per_node = 2
save_s = 300
[paths]
scratch = "/var/tmp"
datasets = "{there}/data"
[container]
variant = "cpu"
[preflight]
timeout_s = 600
max_clock_skew_s = 600
[ssh]
host = "login"
config = "{config}"
folder = "{there}"
backend = "{backend}"
"""
# In the place of tar on the cluster: while there is a pipe of this name, it gets the beginning of
# what is sent, and no more until somebody writes into the pipe.
TAR = """#!/bin/bash
if [[ -p {pipe} ]]; then
  {{ head -c 500000; : >{pipe}.reached; read -r <{pipe}; }} | {tar} "$@"
else
  exec {tar} "$@"
fi
"""


@pytest.fixture(scope="module")
def cluster(own_cluster: Cluster) -> Cluster:
    """Return a Slurm whose sign-ins nobody else adds to."""
    return own_cluster


@dataclass(frozen=True)
class Laptop:
    """A checkout on a machine without Slurm, and Sluice's folder on the cluster."""

    cluster: Cluster
    checkout: Path
    there: Path
    environment: dict[str, str]
    pipe: Path
    """What holds up transfers, when it is made."""

    def use(self, backend: str = "paramiko", more: str = "", **changes: str) -> None:
        """Write site.toml."""
        config = self.cluster.folder / "ssh/client_config"
        values = {"there": str(self.there), "config": str(config), "backend": backend} | changes
        (self.checkout / "site.toml").write_text(SITE.format(**values) + more)

    def edit(self, content: str) -> None:
        """Have the checkout be another than those that are on the cluster."""
        rewrite(self.checkout / "train/new.py", f"# {content}\n")

    def words(self, *command: str) -> list[str]:
        """Return a command line that runs a command where Slurm's commands are not.

        Nor OpenSSH's, unless its backend is meant: else all goes through it.
        """
        is_by_ssh = 'backend = "openssh"' in (self.checkout / "site.toml").read_text()
        hidden = SLURM if is_by_ssh else (*SLURM, "ssh", "ssh-keygen")
        hide = "; ".join(f'mount --bind /dev/null "$(command -v {name})"' for name in hidden)
        user = [] if IS_ROOT else ["--map-root-user"]
        return ["unshare", *user, "--mount", "sh", "-ec", f'{hide}; exec "$@"', "-", *command]

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start make, which goes on by itself, in a group of its own."""
        return waiting.start(
            self.words("make", "--no-print-directory", *command),
            cwd=self.checkout,
            env=self.environment,
            start_new_session=True,
        )

    def make(self, *words: str) -> Result:
        """Run make; a command signs in once."""
        before = self.sign_ins()
        done = waiting.finish(self.start(*words))
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
    name = Parcel(contents=locks, executable=frozenset(), kind="checkouts").environment
    (environments / name).symlink_to(sys.prefix)
    kept = {k: v for k, v in cluster.environment.items() if k != "SLUICE_CLUSTER"}
    environment = kept | {"VENV": sys.prefix, "HF_TOKEN": SECRET, "GIT_CONFIG_GLOBAL": "/dev/null"}
    pipe = folder / "pipe"
    tar = folder / "bin/tar"
    rewrite(tar, TAR.format(pipe=pipe, tar=shutil.which("tar")), 0o755)
    # What Debian's own, a greeting, and a module of a cluster would do to a command, and must not.
    for name in ("rich", "yaml", "numpy"):
        rewrite(folder / f"module/{name}.py", f"raise SystemExit('the wrong {name}')\n")
    profile = f"PATH={tar.parent}:$PATH\nexport PYTHONPATH={folder}/module PYTHONSAFEPATH=1\n"
    profile += 'cd() { builtin cd "$@" && ls; }; export -f cd\n'
    rewrite(folder / ".bash_profile", f"{profile}trap 'echo trap; exit 8' EXIT\n")
    rewrite(folder / ".bash_logout", "echo logged out; clear_console -q\n")
    # A home of its own on the login node: what this machine's user has in .bashrc is not ours.
    settings = cluster.folder / "ssh/sshd_config"
    before = settings.read_text()
    settings.write_text(before.replace("SetEnv ", f"SetEnv HOME={folder} ", 1))
    yield Laptop(cluster, folder / "clone", there, environment, pipe)
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
    own = laptop.there / ".apptainer"
    if own.exists():
        # The first command has made it.
        own.rmdir()
    own.symlink_to(Path(apptainer).parent.parent)
    return laptop


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
    process = laptop.start("tunnel", *words)
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield line
    finally:
        os.killpg(process.pid, signal.SIGINT)
        done = waiting.finish(process)
    assert "Traceback" not in done.stdout + done.stderr


def test_a_tunnel_leads_to_any_port_of_a_node_and_to_nobody_else(either: Laptop) -> None:
    port = free_port()
    # What it sends back is what it got: a megabyte, of which nothing may be lost.
    echo = (
        f"import socket; s = socket.create_server(('', {port})); c = s.accept()[0]; "
        "c.sendall(b''.join(iter(lambda: c.recv(65536), b''))); c.close()"
    )
    words = [sys.executable, "-c", echo]
    server = subprocess.Popen(
        [LOCAL / "exec.sh", "--node", "node1", "--", *words], env=either.cluster.environment
    )
    data = random.Random(0).randbytes(1 << 20)
    try:
        with tunnel(either, "NODE=node1", f"PORT={port}") as line:
            assert f"http://127.0.0.1:{port} forwards to node1:{port}" in line
            addresses = subprocess.run(
                ["ss", "-Hltn", f"sport = :{port}"], capture_output=True, check=True, text=True
            )
            assert re.findall(rf"(\S+):{port}", addresses.stdout) == ["127.0.0.1"]
            assert exchanged(port, data, either) == data
    finally:
        server.kill()
        server.wait()


def exchanged(port: int, data: bytes, laptop: Laptop) -> bytes:
    """Return what comes back through a tunnel."""

    def listening() -> bool:
        done = laptop.cluster.run("ss", "-Hltn", f"sport = :{port}", node="node1")
        return str(port) in done.stdout

    wait_until(listening, "the server on the node")
    with socket.create_connection(("127.0.0.1", port), timeout=HANGS_AFTER_S) as stream:
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: stream.recv(65536), b""))


def test_the_cluster_and_a_job_are_checked_from_afar(either: Laptop) -> None:
    assert re.search(r"(?m)^gpu\* +UP ", either.output("check"))
    never = either.make("check", "JOB=tinyllama", "NODES=9")
    assert never.returncode == 2
    assert "fits:  NODES=2" in never.stdout


def test_a_site_file_is_compared_with_the_clusters_slurm_from_afar(laptop: Laptop) -> None:
    laptop.use()
    said = laptop.output("check-site")
    assert re.search(r"(?m)^slurm.cpus_per_node +4 +4 on 2 nodes$", said)
    # Its own faults need no network, and are told all at once.
    signed_in = laptop.sign_ins()
    laptop.use(backend="rsh", more="[slurn]\n")
    faults = [line for line in laptop.make("check-site").stderr.splitlines() if "error: " in line]
    assert len(faults) == 2
    assert laptop.sign_ins() == signed_in


def test_what_a_tunnel_cannot_lead_to_is_said(either: Laptop) -> None:
    laptop = either
    port = free_port()
    process = laptop.start("tunnel", "NODE=node2", f"PORT={port}")
    assert process.stdout is not None and process.stderr is not None
    assert "forwards to" in process.stdout.readline()
    with socket.create_connection(("127.0.0.1", port), timeout=HANGS_AFTER_S) as stream:
        assert stream.recv(1) == b""
    os.killpg(process.pid, signal.SIGINT)
    said = waiting.finish(process).stderr
    assert f"error: node2:{port}: nothing accepts connections on port {port} of node2" in said


def refused(done: Result) -> str:
    """Return the one line of a refusal."""
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    # What make adds, and what is said of the transfer.
    lines = [x for x in lines if not x.startswith("make: ***") and " files to " not in x]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_bad_input_is_refused_on_the_laptop(
    laptop: Laptop, capfd: pytest.CaptureFixture[str]
) -> None:
    laptop.use()
    signed_in = laptop.sign_ins()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, said in (
            ("", "give RUN= for the TensorBoard of a run, or NODE= and PORT="),
            ("--node node1", "PORT= is missing"),
            ("--node=-oProxyCommand=x --port 80", "is not the name of a node"),
            ("--node node1 --port 99999", "PORT=99999: is not a port"),
            (f"--node node1 --port {port}", f"PORT={port}: cannot be used on this machine"),
        ):
            done = command.call(
                tunnel_command.main,
                *words.split(),
                folder=laptop.checkout,
                # Where no command of Slurm's is.
                environment=laptop.environment | {"PATH": "/nowhere"},
                capfd=capfd,
            )
            assert said in refused(done)
    assert laptop.sign_ins() == signed_in


def test_bad_input_is_refused_from_afar(either: Laptop) -> None:
    before = either.jobs()
    for words, said in (
        (("submit", "NODES=x"), "NODES=x: must be a whole number"),
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
    either: Laptop, request: pytest.FixtureRequest
) -> None:
    clone = either.checkout
    either.edit(request.node.name)
    rewrite(clone / "README.md", "edited")
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
        # What the commands themselves leave, unless PYTHONDONTWRITEBYTECODE is set.
        if "__pycache__" in name.parts:
            continue
        assert (found / name).read_bytes() == path.read_bytes(), name
        assert (found / name).stat().st_mode & 0o100 == path.stat().st_mode & 0o100, name
    assert (either.there / "current").resolve() == found
    assert not (found / ".env").exists()
    assert not (found / "runs/x").exists()
    assert (found / "runs").resolve() == either.there / "runs"
    # Where the site has a place of its own, there is none of ours.
    assert not (found / "datasets").exists()
    origin = json.loads((found / ".sluice-origin.json").read_text())
    assert len(origin["git_commit"]) == 40
    assert b"+edited" in (found / ".sluice-origin.diff").read_bytes()


def test_what_was_changed_there_is_kept_and_not_run(laptop: Laptop) -> None:
    laptop.use()
    laptop.edit("to be changed there")
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
    laptop.edit("two at once")
    both = [laptop.start("status") for _ in range(2)]
    for process in both:
        done = waiting.finish(process)
        assert done.returncode == 0, done.stderr
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
    laptop.edit("the newest")
    laptop.output("status")
    assert len(laptop.checkouts()) == 10
    assert mine.is_dir()


def test_a_transfer_that_was_cut_off_leaves_nothing_to_run_and_goes_on(
    either: Laptop, request: pytest.FixtureRequest
) -> None:
    big = either.checkout / "big"
    big.write_bytes(random.Random(request.node.name).randbytes(1_000_000))
    subprocess.run(["git", "add", "big"], cwd=either.checkout, check=True)
    os.mkfifo(either.pipe)
    try:
        jobs, whole = either.jobs(), either.checkouts()
        process = either.start("submit", "NODES=2", "ARGS=--dry_run")
        reached = either.pipe.with_name(f"{either.pipe.name}.reached")
        wait_until(reached.exists, "a part of the transfer")
        os.killpg(process.pid, signal.SIGKILL)
        waiting.finish(process)
        reached.unlink()
        wait_until(lambda: arrived(either) > 0, "a part of the large file")
        assert arrived(either) < 1_000_000
        assert either.checkouts() == whole
        assert either.jobs() == jobs
        either.pipe.write_text("\n")
        either.pipe.unlink()
        said = either.make("status").stderr
        found = re.search(r"(\d+) of (\d+) files to ", said)
        assert found, said
        assert int(found[1]) < int(found[2])
        (new,) = set(either.checkouts()) - set(whole)
        assert (new / "big").read_bytes() == big.read_bytes()
    finally:
        either.pipe.unlink(missing_ok=True)
        for left in either.there.glob("checkouts/.*.partial"):
            shutil.rmtree(left)
        subprocess.run(["git", "rm", "--quiet", "--cached", "big"], cwd=either.checkout, check=True)
        big.unlink()


def arrived(laptop: Laptop) -> int:
    """How much of the large file has come."""
    return sum(path.stat().st_size for path in laptop.there.glob("checkouts/.*.partial/big"))


# ---- a job, on two nodes, in an image -------------------------------------------------------


@pytest.mark.needs("apptainer")
@pytest.mark.computes(2)
def test_a_script_of_ones_own_is_brought_and_trains(with_image: Laptop) -> None:
    laptop, own = with_image, with_image.checkout.parent / "fit"
    laptop.use()
    shutil.copytree(CHECKOUT / "tests/real/fit", own)
    assert "fits now" in laptop.output("check", "JOB=../fit/fit.yaml")
    said = laptop.output("submit", "JOB=../fit/fit.yaml")
    # It is there by now, and nobody looks for it here.
    shutil.move(own, own.with_name("moved"))
    found = re.search(r"make logs RUN=(\S+)", said)
    assert found
    run = Run(laptop.there / "runs" / found[1])
    Desk(laptop.cluster, laptop.checkout, laptop.environment).wait(run)
    assert run.outcomes()[-1]["outcome"] == "finished", run.logs()
    code = run.folder / "code/script/fit.py"
    assert code.read_bytes() == (CHECKOUT / "tests/real/fit/fit.py").read_bytes()
    record = json.loads((run.folder / "run.json").read_text())
    assert record["script_folder"] == f"{socket.gethostname()}:{own}"


@pytest.mark.needs("apptainer")
@pytest.mark.computes(2)
def test_a_job_is_submitted_followed_looked_at_and_cancelled_with_one_sign_in_each(
    with_image: Laptop, tmp_path: Path
) -> None:
    laptop, pause = with_image, Pause(tmp_path, "after-step", 12)
    (line,) = (f'{name} = "{value}"' for name, value in pause.variable.items())
    stops = f"[environment]\n{line}\n"
    laptop.use(more=stops)
    said = laptop.output("submit", "NODES=2", "ARGS=--dry_run --max_steps 5000")
    found = re.search(r"make logs RUN=(\S+)", said)
    assert found
    name, run = f"RUN={found[1]}", Run(laptop.there / "runs" / found[1])
    with paused(Desk(laptop.cluster, laptop.checkout, laptop.environment), run, pause):
        # Whoever stops looking leaves nothing behind there, and the job goes on.
        following = laptop.start("logs", name)
        assert following.stdout is not None
        while "step " not in following.stdout.readline():
            assert following.poll() is None
        assert running_there("cluster", "logs", found[1])
        os.killpg(following.pid, signal.SIGINT)
        waiting.finish(following)
        over = "the end of make logs there"
        wait_until(lambda: not running_there("cluster", "logs", found[1]), over)
        assert laptop.cluster.state_of(run.job_id) == "RUNNING"
        port = free_port()
        with tunnel(laptop, name, f"PORT={port}") as words:
            assert f"http://127.0.0.1:{port} forwards to 10." in words
            wait_until(lambda: curves(port) == ["."], "the curves")
            steps = laptop.cluster.output("squeue", "--steps", "--noheader", "-o", "%j %N")
            assert "board.sh node1" in steps
        wait_until(lambda: "board.sh" not in laptop.cluster.output("squeue", "--steps"), "its end")
        laptop.use("openssh", more=stops)
        before = laptop.sign_ins()
        cancel = laptop.start("cancel", name)
        wait_until(lambda: "the processes are asked to save" in run.logs(), "a word to the job")
    done = waiting.finish(cancel)
    assert done.returncode == 0, done.stderr
    assert "is cancelled; continue with make submit" in done.stdout
    assert laptop.sign_ins() - before == 1
    assert (run.folder / "checkpoints/latest").exists()
    followed = laptop.make("logs", name).stdout
    assert "step     10" in followed
    assert "cancelled" in followed.splitlines()[-1]
    rows = json.loads(laptop.output("status", "FORMAT=json"))["runs"]
    assert [row["state"] for row in rows if row["run"] == found[1]] == ["cancelled"]
    assert_recorded(run, laptop)
    # When it is over, the curves are shown from the login node. What ends by itself there, ends the
    # tunnel.
    board = laptop.start("tunnel", name, f"PORT={port}")
    assert board.stdout is not None
    assert f"http://127.0.0.1:{port} forwards to 127.0.0.1:" in board.stdout.readline()
    wait_until(lambda: curves(port) == ["."], "the curves")
    (pid,) = (
        pid
        for pid, words, _ in processes()
        if b"tensorboard.main" in words and b"127.0.0.1" in words and is_at(run, pid)
    )
    os.kill(pid, signal.SIGKILL)
    done = waiting.finish(board)
    assert "has ended" in done.stderr
    assert done.returncode == 2


def curves(port: int) -> list[str]:
    """Return the runs that TensorBoard has read by now."""
    url = f"http://127.0.0.1:{port}/data/runs"
    with urllib.request.urlopen(url, timeout=HANGS_AFTER_S) as answer:
        found: list[str] = json.load(answer)
    return found


def is_at(run: Run, pid: int) -> bool:
    """Return whether a process sees this run's folder."""
    return run.folder.name in Path(f"/proc/{pid}/mountinfo").read_text()


def assert_recorded(run: Run, laptop: Laptop) -> None:
    """Check that the run has the laptop's code and commit, and nothing that is secret."""
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
