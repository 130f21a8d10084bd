"""What all tests share: the environment of a child, what a machine must have, turns, kept logs.

A test that needs more than Python says so: `@pytest.mark.needs("unshare")`. Where that is missing
the test is skipped and listed with the reason; with STRICT=1 it fails. One that computes says with
how many processes, `@pytest.mark.computes(2)`, and takes its turn (turns.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.checkout import state_of
from tests.shared import CHECKOUT, SHARED, clean_up, shared
from tests.turns import turn

# What a test can need beside Python and make: a command that succeeds where it is there.
NEEDS = {
    "unshare": ["unshare", "--map-root-user", "--mount", "--net", "true"],
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

# Examples that are new in each run belong to the drills; a clock decides nothing.
NO_CLOCK: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("gate", derandomize=True, database=None, **NO_CLOCK)
hypothesis.settings.register_profile("drills", print_blob=True, max_examples=2000, **NO_CLOCK)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="of what is random in the drills (a new one)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"needs(name): runs only with one of {', '.join(NEEDS)}")
    config.addinivalue_line("markers", "computes(processes): takes its turn with this many")
    hypothesis.settings.load_profile("gate")
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
    # Before torch is imported: a worker for each core computes with one thread.
    os.environ["OMP_NUM_THREADS"] = "1"
    # A worker inherits it.
    if SHARED not in os.environ:
        os.environ[SHARED] = tempfile.mkdtemp(prefix="sluice-tests-")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    master = shared() / "master"
    if master.exists() and state_of(master) != (shared() / "master.state").read_text():
        # Every other test has seen it, too.
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\nerror: a test wrote into the checkout that all tests share (tests/checkout.py)")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        clean_up()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Wait for a turn, outside of every limit of time."""
    marker = item.get_closest_marker("computes")
    if marker is None:
        return (yield)
    with turn(shared() / "turns", *marker.args):
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only root can do, where root runs no tests: no machine makes up for that."""
    if os.geteuid() == 0:
        return
    roots = [i for i in items for m in i.iter_markers("needs") if "root" in m.args]
    items[:] = [item for item in items if item not in roots]
    config.hook.pytest_deselected(items=roots)


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
    """Return a datasets folder that a worker's tests share; the sample is packed into it once."""
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
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(run_folder: Path) -> dict[int, float]:
    """Return the training loss of each logged step; fails if a step is there twice."""
    found = [(line["step"], line["loss"]) for line in read_metrics(run_folder) if "loss" in line]
    assert len({step for step, _ in found}) == len(found), "a step was logged twice"
    return dict(found)
