"""What the tests of the image share: an ordinary user, and the image that it builds, once."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.accounts import CHECKOUT, IS_ROOT, ORDINARY, Account, make_account


@pytest.fixture(scope="session")
def apptainer() -> str:
    """Return the command, as the commands of Sluice find it."""
    check = [CHECKOUT / "containers/install-apptainer.sh", "--check"]
    return subprocess.run(check, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="session")
def ordinary_user() -> Iterator[str]:
    """Return the name of a user who is not root; as root, one is made for the tests."""
    if not IS_ROOT:
        yield pwd.getpwuid(os.geteuid()).pw_name
        return
    is_new = ORDINARY not in {entry.pw_name for entry in pwd.getpwall()}
    if is_new:
        # With its lines in /etc/subuid and /etc/subgid, which useradd writes.
        subprocess.run(["useradd", "--create-home", ORDINARY], check=True)
    yield ORDINARY
    if is_new:
        subprocess.run(
            ["userdel", "--remove", "--force", ORDINARY], check=True, capture_output=True
        )


@pytest.fixture(scope="session")
def builder(ordinary_user: str) -> Iterator[Account]:
    """Return the account that builds."""
    account = make_account(ordinary_user)
    yield account
    shutil.rmtree(account.home)


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
    builder: Account = request.getfixturevalue("builder")
    checkout: Path = request.getfixturevalue("builder_checkout")
    make = ["make", "build-image", "VARIANT=cpu", "BASE=debian"]
    done = builder.run(*make, cwd=checkout, timeout=1500)
    assert done.returncode == 0, done.stderr
    return checkout / "images/sluice-cpu.sif"
