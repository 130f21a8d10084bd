"""What the tests share: the checkout, its Python, a folder of staged samples, a launcher.

A test that needs more than Python says so: `@pytest.mark.needs("unshare")`. Where that is missing
the test is skipped and listed with the reason; with STRICT=1 it fails.

`make test` runs four workers (pytest-xdist), also on two cores: much of the time is waiting. What
takes minutes to make, and the ordinary user, are made once for all and removed by the process that
started them.
"""

from __future__ import annotations

import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

from tests.image.accounts import IS_ROOT, ORDINARY, Account, make_account

CHECKOUT = Path(__file__).parent.parent
# The variable that names the folder of what all workers share.
SHARED = "SLUICE_TESTS_SHARED"
# The longest that any launch of these tests may take before it counts as hanging.
LAUNCH_TIMEOUT_S = 180

# What a test can need beside Python and make: a command that succeeds where it is there.
NEEDS = {
    "unshare": ["unshare", "--map-root-user", "--mount", "--net", "true"],
    "pgrep": ["pgrep", "--version"],
    "git": ["git", "--version"],
    "c++": ["c++", "--version"],
    "apptainer": [str(CHECKOUT / "containers/install-apptainer.sh"), "--check"],
    "mmdebstrap": ["mmdebstrap", "--version"],
    "docker-registry": ["docker-registry", "--version"],
    "skopeo": ["skopeo", "--version"],
    "sshd": ["bash", "-c", "PATH=$PATH:/usr/sbin type sshd ssh ssh-keygen ssh-agent ssh-add"],
    "root": ["bash", "-c", "[ $(id -u) = 0 ] && unshare --mount true"],
    "slurm": [
        "bash",
        "-c",
        "PATH=$PATH:/usr/sbin type slurmctld slurmd slurmdbd sinfo munged mariadbd sshd ip",
    ],
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"needs(name): runs only with one of {', '.join(NEEDS)}")
    # A shell's background jobs ignore Ctrl+C and Ctrl+\, and those of nohup a closed terminal; all
    # that these tests start would, too.
    for number, normal in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, normal)
    # `make test ARGS=...` hands its own words down to every make that these tests start.
    for name in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS"):
        os.environ.pop(name, None)
    # A worker inherits it.
    if SHARED not in os.environ:
        os.environ[SHARED] = tempfile.mkdtemp(prefix="sluice-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    shared = Path(os.environ.pop(SHARED))
    for home in (shared / "homes").glob("*"):
        shutil.rmtree(home.readlink())
    if (shared / "new_user").exists():
        remove = ["userdel", "--remove", "--force", ORDINARY]
        subprocess.run(remove, check=True, capture_output=True)
    shutil.rmtree(shared)


# What takes longest comes first, since a worker that begins it last keeps the others waiting; and
# beside the first, which builds the image, what needs none.
ORDER = (
    "tests/cluster/test_submit.py",
    "tests/cluster/test_check.py",
    "tests/cluster/test_local_cluster.py",
    "tests/distributed/test_trajectories.py",
    "tests/distributed/test_faults.py",
    "tests/cluster/test_lost_nodes.py",
    "tests/cluster/test_plan.py",
    "tests/image/test_build.py",
    "tests/cluster/test_",
    "tests/image/",
    "tests/distributed/",
)
# The files that share a cluster, a line for each.
CLUSTERS = (
    ("tests/cluster/test_submit.py",),
    ("tests/cluster/test_lost_nodes.py", "tests/cluster/test_plan.py"),
    ("tests/cluster/test_",),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        starts = [item.nodeid.startswith(beginning) for beginning in ORDER]
        return [*starts, True].index(True)

    items.sort(key=turn)


class PlaceScheduling(LoadScopeScheduling):
    """Gives the tests that share a cluster, or a file, to one worker.

    The marks `xdist_group` would do, but pytest 9.2 has node ids that xdist 3.8 cannot change.
    """

    def _split_scope(self, nodeid: str) -> str:
        for files in CLUSTERS:
            if nodeid.startswith(files):
                return files[0]
        return nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return PlaceScheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            if not has(name):
                pytest.skip(f"this machine has no working {name} ({' '.join(NEEDS[name])})")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("STRICT") == "1":
        report.outcome = "failed"
        report.longrepr = f"STRICT=1 and skipped: {report.longrepr}"
    return report


@cache
def has(name: str) -> bool:
    """Return whether this machine has what a test needs, by trying it."""
    command = NEEDS[name]
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def datasets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a datasets folder that all tests share; the sample is packed into it once."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def clean_environment(datasets_folder: Path) -> dict[str, str]:
    """Return the environment for a child: ours, without what a launcher or Sluice sets."""
    ours = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLUICE_", "ACCELERATE_", "FSDP_", "PET_", "HF_", "MAKE", "MFLAGS"))
    }
    return ours | {
        "SLUICE_DATASETS": str(datasets_folder),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }


def free_port() -> int:
    """Return a port that nobody listens on, below the range of outgoing connections."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")


Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def launch(clean_environment: dict[str, str]) -> Launch:
    """Return a function that runs a module under the launcher, as slurm/node.sh does."""

    def run(
        accel: str,
        num_processes: int,
        module: str,
        *arguments: str,
        environment: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            launch_command(accel, num_processes, module, *arguments),
            check=False,
            cwd=CHECKOUT,
            env=clean_environment
            | {"SLUICE_WORLD_SIZE": str(num_processes), "SLUICE_DEVICE": "cpu"}
            | (environment or {}),
            capture_output=True,
            text=True,
            timeout=LAUNCH_TIMEOUT_S,
        )

    return run


def launch_command(accel: str, num_processes: int, module: str, *arguments: str) -> list[str]:
    """Return the launcher's command line for `num_processes` on this machine."""
    launcher = [sys.executable, "slurm/launch.py", "--num_machines", "1", "--machine_rank", "0"]
    launcher += ["--config_file", f"configs/accelerate/{accel}.yaml"]
    launcher += ["--num_processes", str(num_processes), "--main_process_port", str(free_port())]
    return [*launcher, "--module", module, *arguments]


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(run_folder: Path) -> dict[int, float]:
    """Return the training loss of each logged step; fails if a step is there twice."""
    found = [(line["step"], line["loss"]) for line in read_metrics(run_folder) if "loss" in line]
    assert len({step for step, _ in found}) == len(found), "a step was logged twice"
    return dict(found)


# ---- an ordinary user, and the image that it builds, once ------------------------------------


def once(name: str, make: Callable[[], str]) -> str:
    """Return what `make` returned in the first worker that asked; the others wait for it."""
    shared = Path(os.environ[SHARED])
    with FileLock(shared / f"{name}.lock"):
        if not (shared / name).exists():
            (shared / name).write_text(make())
        return (shared / name).read_text()


@pytest.fixture(scope="session")
def apptainer() -> str:
    """Return the command, as the commands of Sluice find it."""
    check = [CHECKOUT / "containers/install-apptainer.sh", "--check"]
    return subprocess.run(check, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="session")
def ordinary_user() -> str:
    """Return the name of a user who is not root; as root, one is made for the tests."""
    if not IS_ROOT:
        return pwd.getpwuid(os.geteuid()).pw_name

    def make() -> str:
        if ORDINARY not in {entry.pw_name for entry in pwd.getpwall()}:
            # With its lines in /etc/subuid and /etc/subgid, which useradd writes.
            subprocess.run(["useradd", "--create-home", ORDINARY], check=True)
            (Path(os.environ[SHARED]) / "new_user").touch()
        return ORDINARY

    return once("ordinary_user", make)


@pytest.fixture(scope="session")
def builder(ordinary_user: str) -> Account:
    """Return the account that builds, one for each worker; the image in it is for all."""
    account = make_account(ordinary_user)
    homes = Path(os.environ[SHARED]) / "homes"
    homes.mkdir(exist_ok=True)
    (homes / account.home.name).symlink_to(account.home)
    return account


@pytest.fixture(scope="session")
def builder_checkout(builder: Account) -> Path:
    """Return its checkout, with an Apptainer of its own and the light environment."""
    checkout = builder.checkout()
    for command in ("containers/install-apptainer.sh", "containers/venv.sh --base"):
        done = builder.run(*command.split(), cwd=checkout)
        assert done.returncode == 0, done.stderr
    return checkout


@pytest.fixture(scope="session")
def base(builder: Account, builder_checkout: Path) -> Path:
    """Return the root file system of a Debian, from the configured mirror."""
    folder = builder.home / "base"
    done = builder.run("containers/base.sh", folder, cwd=builder_checkout)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def image(request: pytest.FixtureRequest) -> Path:
    """Return a CPU image with its manifest beside it, in a folder that every user may enter.

    It is built as the README tells, by the ordinary user; SLUICE_TEST_IMAGE names one that is
    there already, for those who work on the tests.
    """
    if given := os.environ.get("SLUICE_TEST_IMAGE"):
        return Path(given).absolute()

    def make() -> str:
        builder: Account = request.getfixturevalue("builder")
        checkout: Path = request.getfixturevalue("builder_checkout")
        words = ["make", "build-image", "VARIANT=cpu", "BASE=debian"]
        done = builder.run(*words, cwd=checkout, timeout=1500)
        assert done.returncode == 0, done.stderr
        return str(checkout / "images/sluice-cpu.sif")

    return Path(once("image", make))
