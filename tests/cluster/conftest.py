"""What the tests of the cluster share: a private Slurm, up once, and a checkout to submit from."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.desk import Desk, environment
from tests.cluster.local import LOCAL, Cluster, new_cluster
from tests.image.accounts import IS_ROOT, Account, lay_out, make_account


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """Return a folder that every user may enter, with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="sluice-cluster-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def cluster(short_folder: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Return a private Slurm with two nodes; as root, with an ordinary user beside root.

    SLUICE_TEST_ROOTFS names a system whose Slurm it is, for a look at another release.
    """
    users = (request.getfixturevalue("ordinary_user"),) if IS_ROOT else ()
    made = new_cluster(short_folder / "c", users)
    options = ["--users", ",".join(users)] if users else []
    if rootfs := os.environ.get("SLUICE_TEST_ROOTFS"):
        options += ["--rootfs", rootfs]
    done = made.local("up.sh", *options)
    assert done.returncode == 0, done.stderr
    yield made
    done = made.local("down.sh")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def stranger(ordinary_user: str) -> Iterator[Account]:
    """Return the account of an ordinary user, with slurm/local in a checkout of its own."""
    account = make_account(ordinary_user)
    shutil.copytree(LOCAL, account.home / "sluice/slurm/local")
    account.own(account.home)
    yield account
    shutil.rmtree(account.home)


@pytest.fixture(scope="session")
def desk(cluster: Cluster, apptainer: str, image: Path) -> Iterator[Desk]:
    """Return a checkout at the cluster."""
    folder = Path(tempfile.mkdtemp(prefix="sluice-desk-"))
    folder.chmod(0o755)
    lay_out(folder / "sluice")
    yield Desk(cluster, folder / "sluice", environment(cluster, apptainer, image))
    shutil.rmtree(folder)
