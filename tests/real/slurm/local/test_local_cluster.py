"""slurm/local, for real: a private Slurm that comes up, fails on purpose, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import waiting
from tests.real.accounts import Account, make_account
from tests.real.private_slurm import LOCAL, Cluster, Result, new_cluster
from tests.waiting import wait_until

pytestmark = pytest.mark.needs("slurm")


@pytest.fixture(scope="module")
def cluster(own_cluster: Cluster) -> Cluster:
    """Return a Slurm whose plugs nobody else needs."""
    return own_cluster


NODES = ("node1", "node2")


def one_error(done: Result, *words: str) -> None:
    """Check for one line on stderr with these words, and exit code 2."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def ssh(folder: Path, *command: str, key: Path | None = None) -> Result:
    """Run a command on the login node through the door."""
    identity = ["-o", f"IdentityFile={key}"] if key else ["-F", str(folder / "ssh/client_config")]
    port = (folder / "ssh/port").read_text().strip()
    if key:
        identity += ["-F", "none", "-p", port, "-o", "HostName=127.0.0.1", "-o", "BatchMode=yes"]
        identity += ["-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no"]
        identity += ["-o", "UserKnownHostsFile=/dev/null"]
    return waiting.run(["ssh", *identity, "login", *command], cwd="/", env=os.environ)


def submit(cluster: Cluster, *options: str, command: str) -> str:
    """Submit a job that runs `command`; returns its id."""
    output = log_of(cluster, "%j")
    return cluster.output(
        "sbatch", "--parsable", f"--output={output}", "--open-mode=append", *options,
        f"--wrap={command}",
    )  # fmt: skip


def log_of(cluster: Cluster, job: str) -> Path:
    """Return where a job's output goes: beside its cluster, and not where another one's does."""
    return cluster.folder.with_name(f"{cluster.folder.name}-job-{job}.log")


# ---- what is left ---------------------------------------------------------------------------


def processes_in(spaces: set[str]) -> dict[Path, str]:
    """Return the processes of this machine in these network namespaces, and when each started."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str((process / "ns/net").readlink()) in spaces and (start := started(process)):
                found[process] = start
        except OSError:
            continue  # It has ended, or is another user's.
    return found


def still_there(processes: dict[Path, str]) -> list[Path]:
    """Return those that have not ended; a number may be another process's by now."""
    return [process for process, start in processes.items() if started(process) == start]


def started(process: Path) -> str:
    """Return when a process of /proc started, in ticks; nothing if it has ended."""
    try:
        state, *fields = (process / "stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return fields[18] if state != "Z" else ""


READ_NAMESPACE = ("readlink", "/proc/self/ns/net")


def processes_of(folder: Path) -> list[str]:
    """Return the command lines that name the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line, variables = (process / name for name in ("cmdline", "environ"))
            words, known = line.read_bytes(), variables.read_bytes()
        except OSError:
            # It has just ended.
            continue
        if str(folder).encode() in words + known and process.name != str(os.getpid()):
            found.append(words.decode(errors="replace"))
    return found


def interfaces() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


def assert_nothing_left(folder: Path, interfaces_before: list[str], files: set[str]) -> None:
    assert not folder.exists()
    # What was killed is gone a moment later, on a busy machine.
    left = "the end of all processes"
    wait_until(lambda: not processes_of(folder), left, so_far=lambda: str(processes_of(folder)))
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    assert interfaces() == interfaces_before
    assert {path.name for path in folder.parent.iterdir()} <= files


# ---- what works -----------------------------------------------------------------------------


def test_two_nodes_are_idle(cluster: Cluster) -> None:
    shown = cluster.output("sinfo", "--noheader", "--partition=gpu", "-o", "%N %T %G %m %c")
    assert shown == "node[1-2] idle gpu:2 8000 4"
    assert cluster.output("hostname") == "login"
    assert cluster.output("hostname", node="node2") == "node2"


def test_a_node_sees_its_own_network_and_scratch(cluster: Cluster) -> None:
    assert cluster.output("ls", "/sys/class/net", node="node1").split() == ["eth0", "lo"]
    cluster.output("touch", "/var/tmp/mine", node="node1")
    assert cluster.output("ls", "/var/tmp", node="node2") == ""
    assert not Path("/var/tmp/mine").exists()
    assert cluster.output("getent", "hosts", "node2", node="node1").split()[0] == "10.77.0.12"


def test_gpus_are_handed_out_and_accounted(cluster: Cluster) -> None:
    shown = 'echo "devices $CUDA_VISIBLE_DEVICES"'
    assert cluster.output("srun", "--gpus-per-node=2", "bash", "-c", shown) == "devices 0,1"
    job = submit(cluster, "--gpus-per-node=1", "--job-name=counted", command="true")
    cluster.wait_for(job, "COMPLETED")
    sacct = ["sacct", "-X", "--noheader", "--parsable2", f"--jobs={job}"]

    def accounted() -> bool:
        line = cluster.output(*sacct, "--format=JobName,State,Account,AllocTRES")
        return line.startswith("counted|COMPLETED|research|") and "gres/gpu=1" in line

    wait_until(accounted, "the job in sacct")


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--partition=down"], None),
        (["--partition=short", "--nodes=2"], "Node count"),
        (["--partition=short", "--time=31"], "time limit"),
        (["--qos=short", "--time=11"], "QOS"),
        (["--account=closed"], "account"),
        (["--gpus-per-node=3"], "node configuration"),
    ],
)
def test_limits_are_kept(cluster: Cluster, options: list[str], refusal: str | None) -> None:
    user = cluster.users[0] if cluster.users else None
    command = ["sbatch", "--parsable", "--output=/dev/null", "--wrap=true", *options]
    done = cluster.run(*command, user=user)
    if refusal is None:
        assert done.returncode == 0, done.stderr
        asked = ("squeue", "--noheader", f"--jobs={done.stdout.strip()}", "-o", "%r")
        # Until the scheduler has looked at it, there is none.
        wait_until(lambda: cluster.output(*asked) != "None", "a reason")
        assert cluster.output(*asked) == "PartitionDown"
        cluster.output("scancel", done.stdout.strip())
    else:
        assert done.returncode == 1, done.stdout
        assert refusal in done.stderr


@pytest.mark.needs("root")  # whose cluster has other users
def test_other_users_run_jobs_as_themselves(cluster: Cluster) -> None:
    name = cluster.users[0]
    assert cluster.output("srun", "id", "--user", "--name", user=name) == name
    done = cluster.run("scontrol", "update", "NodeName=node1", "State=DRAIN", user=name)
    assert done.returncode != 0


def test_ssh_leads_to_the_login_node_and_wants_the_key(cluster: Cluster, tmp_path: Path) -> None:
    done = ssh(cluster.folder, "hostname; sinfo --noheader --partition=gpu -o %D")
    assert (done.returncode, done.stdout.split()) == (0, ["login", "2"]), done.stderr
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    done = ssh(cluster.folder, "hostname", key=key)
    assert done.returncode == 255
    assert "Permission denied" in done.stderr


def test_exec_keeps_folder_streams_environment_and_exit_code(cluster: Cluster) -> None:
    command = 'cat; pwd; echo "$KEPT"; echo "$SLUICE_CLUSTER_INSIDE" >&2; exit 7'
    done = subprocess.run(
        [LOCAL / "exec.sh", "bash", "-c", command],
        check=False,
        input="in\n",
        cwd="/usr/share",
        env=cluster.environment | {"KEPT": "a  b"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (7, "in\n/usr/share\na  b\n")
    assert done.stderr == "1\n"
    again = cluster.output(LOCAL / "exec.sh", LOCAL / "exec.sh", "hostname")
    assert again == "login"


# ---- what is refused ------------------------------------------------------------------------


def test_it_does_not_start_twice(cluster: Cluster) -> None:
    one_error(cluster.local("up.sh"), str(cluster.folder), "is up", "make cluster-down")


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("up.sh", ["--node", "3"], ["'--node'", "--nodes"]),
        ("up.sh", ["--nodes", "0"], ["--nodes 0", "1 to 16"]),
        ("up.sh", ["--nodes"], ["--nodes", "value"]),
        ("up.sh", ["--ssh-port", "70000"], ["70000"]),
        ("up.sh", ["--users", "no-such-user"], ["--users"]),
        ("up.sh", ["--rootfs", "/nowhere"], ["--rootfs"]),
        ("drill.sh", ["explode", "node1"], ["explode", "power-off"]),
        ("drill.sh", ["cut", "node9"], ["node9", "node1, node2"]),
        ("drill.sh", ["power-on", "node1"], ["node1", "already on"]),
        ("exec.sh", [], ["no command"]),
        ("exec.sh", ["--nod", "node1"], ["--nod", "--node"]),
        ("exec.sh", ["--node", "../node1", "true"], ["../node1", "node1, node2"]),
        ("down.sh", ["now"], ["now"]),
    ],
)
def test_what_is_not_understood_is_one_line(
    cluster: Cluster, script: str, arguments: list[str], words: list[str]
) -> None:
    one_error(cluster.local(script, *arguments), *words)


def test_inside_the_cluster_it_cannot_be_ended(cluster: Cluster) -> None:
    for script in ("up.sh", "down.sh"):
        one_error(cluster.run(LOCAL / script), "inside")
    one_error(cluster.run(LOCAL / "drill.sh", "cut", "node1"), "inside")
    one_error(cluster.run(LOCAL / "exec.sh", "--node", "node1", "true"), "inside")


@pytest.mark.parametrize("name", ["exec.sh", "drill.sh"])
def test_without_a_cluster_it_says_how_to_start_one(tmp_path: Path, name: str) -> None:
    words = ["cut", "node1"] if name == "drill.sh" else ["true"]
    one_error(new_cluster(tmp_path / "none").local(name, *words), "make cluster-up")


def test_a_folder_that_is_not_a_clusters_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    for script in ("up.sh", "down.sh"):
        one_error(new_cluster(tmp_path).local(script), str(tmp_path), "SLUICE_CLUSTER")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_paths_that_slurm_cannot_take_are_refused(short_folder: Path) -> None:
    for name, word in (("with space", "SLUICE_CLUSTER"), ("long" * 20, "characters too long")):
        one_error(new_cluster(short_folder / name).local("up.sh"), word, "such as /tmp/")
        assert not (short_folder / name).exists()


@pytest.mark.needs("unshare")
def test_missing_commands_are_named_with_their_packages(short_folder: Path) -> None:
    hide = "mount --bind /dev/null /usr/sbin/slurmctld; mount --bind /dev/null /usr/sbin/munged; "
    missing = new_cluster(short_folder / "missing")
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", hide + f"exec {LOCAL}/up.sh"]
    done = waiting.run(command, cwd="/", env=missing.environment)
    one_error(done, "slurmctld, munged: missing", "apt-get install", "slurmctld munge")
    assert not missing.folder.exists()


# ---- drills ---------------------------------------------------------------------------------


def test_a_restarted_controller_keeps_the_queue(cluster: Cluster) -> None:
    job = submit(cluster, "--nodes=2", command="sleep 3000")
    cluster.wait_for(job, "RUNNING")
    assert cluster.drill("restart", "controller") == "controller: restarted\n"
    assert cluster.state_of(job) == "RUNNING"
    cluster.output("scancel", job)


def wait_until_idle(cluster: Cluster) -> None:
    """Wait for jobs that are ending; without its node, one would end a minute later."""
    states = ("sinfo", "--noheader", "--partition=gpu", "-o", "%T")
    wait_until(lambda: cluster.output(*states) == "idle", "idle nodes", so_far=cluster.queue)


def test_a_cut_node_comes_back(cluster: Cluster) -> None:
    wait_until_idle(cluster)
    assert cluster.drill("cut", "node2") == "node2: is cut off\n"
    # What runs on it goes on, and can be looked at.
    link = ("cat", "/sys/class/net/eth0/carrier")
    assert cluster.output(*link, node="node2") == "0"
    assert cluster.output(*link, node="node1") == "1"
    assert cluster.drill("join", "node2") == "node2: is back on the network\n"
    assert sorted(cluster.output("srun", "--nodes=2", "hostname").split()) == list(NODES)


def test_a_node_without_power_is_off_and_comes_back(cluster: Cluster) -> None:
    wait_until_idle(cluster)
    assert cluster.drill("power-off", "node2") == "node2: is off\n"
    one_error(cluster.run("true", node="node2"), "node2", "is off", "power-on node2")
    assert cluster.drill("power-on", "node2") == "node2: is on\n"
    assert sorted(cluster.output("srun", "--nodes=2", "hostname").split()) == list(NODES)


# ---- another user, other clusters, the end --------------------------------------------------


@pytest.fixture
def stranger(ordinary_user: str) -> Iterator[Account]:
    """Return the account of an ordinary user, with slurm/local in a checkout of its own."""
    account = make_account(ordinary_user)
    shutil.copytree(LOCAL, account.home / "sluice/slurm/local")
    account.own(account.home)
    yield account
    shutil.rmtree(account.home)


def test_an_ordinary_user_has_one_too_and_nothing_is_left(stranger: Account) -> None:
    local = stranger.home / "sluice/slurm/local"
    state = stranger.home / "sluice/.cluster"
    before, files = interfaces(), {"slurm"}
    done = stranger.run(local / "up.sh")
    try:
        assert done.returncode == 0, done.stderr
        assert "make cluster-shell" in done.stdout and f"ssh -F {state}" in done.stdout
        shown = ["sinfo", "--noheader", "--partition=gpu", "-o", "%D %T"]
        assert stranger.run(local / "exec.sh", *shown).stdout == "2 idle\n"
        spaces = {
            stranger.run(local / "exec.sh", "--node", node, *READ_NAMESPACE).stdout.strip()
            for node in ("login", *NODES)
        }
        assert len(spaces) == 3
        inside = processes_in(spaces)
        assert inside
        done = stranger.run(
            local / "exec.sh", "srun", "--nodes=2", "bash", "-c", "hostname; id -un"
        )
        assert sorted(done.stdout.split()) == sorted([*NODES, stranger.name, stranger.name])
        done = stranger.run("ssh", "-F", state / "ssh/client_config", "login", "hostname")
        assert done.stdout == "login\n", done.stderr
        one_error(stranger.run(local / "up.sh", "--users", "daemon"), "only root")
        # No one else gets at what lies in there.
        assert state.stat().st_mode & 0o077 == 0
    finally:
        done = stranger.run(local / "down.sh")
    assert done.returncode == 0, done.stderr
    assert_nothing_left(state, before, files)
    assert not still_there(inside)
    done = stranger.run(local / "down.sh")
    assert (done.returncode, done.stdout) == (0, f"{state}: no cluster is up\n")


@pytest.fixture
def other(short_folder: Path) -> Iterator[Cluster]:
    """Return a cluster that is not up; whatever becomes of it is brought down."""
    made = new_cluster(short_folder / "other")
    yield made
    done = made.local("down.sh")
    assert done.returncode == 0, done.stderr


def test_without_names_slurm_works_and_a_crash_leaves_what_down_removes(other: Cluster) -> None:
    before, files = interfaces(), {path.name for path in other.folder.parent.iterdir()}
    done = other.local("up.sh", "--no-names", "--nodes", "3", "--ssh-port", "0")
    assert done.returncode == 0, done.stderr
    assert "ssh" not in done.stdout
    spaces = {other.output(*READ_NAMESPACE, node=node) for node in ("login", *NODES)}
    assert len(spaces) == 3
    inside = processes_in(spaces)
    for name in ("node1", "node2", "login"):
        assert other.run("getent", "hosts", name, node="node1").returncode == 2
    hostnames = other.output("srun", "--nodes=3", "hostname").split()
    assert sorted(hostnames) == ["node1", "node2", "node3"]
    # A job's own steps start from a node.
    log = log_of(other, submit(other, "--nodes=2", command="srun hostname"))
    wait_until(lambda: log.exists() and len(log.read_text().split()) == 2, "the batch job")
    log.unlink()

    leader = (other.folder / "login.pid").read_text().split()[0]
    (pid,) = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    os.kill(int(pid), signal.SIGKILL)
    wait_until(lambda: processes_of(other.folder) == [], "the end of all processes")
    one_error(other.run("true"), "has stopped", "make cluster-down")
    done = other.local("down.sh")
    assert done.returncode == 0, done.stderr
    assert_nothing_left(other.folder, before, files)
    assert not still_there(inside)
    assert other.local("down.sh").stdout == f"{other.folder}: no cluster is up\n"


def test_a_start_that_fails_is_one_line_and_leaves_nothing(other: Cluster) -> None:
    before, files = interfaces(), {path.name for path in other.folder.parent.iterdir()}
    broken = other.folder.parent / "broken"
    shutil.copytree(LOCAL, broken / "slurm/local")
    settings = broken / "slurm/local/conf/slurmdbd.conf.in"
    settings.write_text(settings.read_text() + "NoSuchSetting=1\n")
    done = waiting.run([broken / "slurm/local/up.sh"], cwd="/", env=other.environment)
    shutil.rmtree(broken)
    one_error(done, "did not start", "NoSuchSetting")
    assert_nothing_left(other.folder, before, files)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_a_start_that_is_interrupted_leaves_nothing(
    other: Cluster, number: signal.Signals, tmp_path: Path
) -> None:
    before, files = interfaces(), {path.name for path in other.folder.parent.iterdir()}
    # The start comes this far and no further: munge is up, and the database is about to be.
    stuck = tmp_path / "mariadb-install-db"
    stuck.write_text(f"#!/bin/sh\n: >{tmp_path}/here\nexec sleep 3000\n")
    stuck.chmod(0o755)
    path = f"{tmp_path}:{other.environment['PATH']}"
    up = waiting.start([LOCAL / "up.sh"], cwd="/", env=other.environment | {"PATH": path})
    wait_until((tmp_path / "here").exists, "the start of the database")
    up.send_signal(number)
    done = waiting.finish(up)
    if number == signal.SIGTERM:
        assert (done.returncode, done.stderr) == (130, f"{other.folder}: interrupted\n")
    else:
        assert other.local("down.sh").returncode == 0
    assert_nothing_left(other.folder, before, files)
