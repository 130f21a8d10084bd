"""The image that the real tests run in: built as the README tells, but with a package added, and
with passwords all around.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.package_index import serving
from tests.real import accounts
from tests.real.accounts import Account
from tests.shared import CHECKOUT, once, shared
from tests.turns import turn

# Planted wherever a password can stand; none of them may be found in what a build leaves.
SECRETS = {
    "environment": "sluice-planted-in-environment",
    "pip": "sluice-planted-in-pip",
    "apt": "sluice-planted-in-apt",
    "extra": "sluice-planted-in-extra",
}


def image() -> Path:
    """Return a CPU image with its manifest beside it, in a folder that every user may enter.

    It is built once for a run of the tests, by the ordinary user; SLUICE_TEST_IMAGE names one that
    is there already, for those who work on the tests.
    """
    if given := os.environ.get("SLUICE_TEST_IMAGE"):
        return Path(given).absolute()

    def make() -> str:
        with turn(shared() / "turns", 2):
            return str(build(accounts.builder(), accounts.builder_checkout(), apptainer()))

    return Path(once("image", make))


def apptainer() -> str:
    """Return the command, as the commands of Sluice find it."""
    check = [CHECKOUT / "containers/install-apptainer.sh", "--check"]
    return subprocess.run(check, check=True, capture_output=True, text=True).stdout.strip()


def build(builder: Account, checkout: Path, apptainer: str) -> Path:
    """Build the CPU image; return it. Its manifest, log and lists lie beside it."""
    asked = ["python3", "-m", "pip", "config", "get", "global.extra-index-url"]
    listed = subprocess.run(asked, check=False, capture_output=True, text=True)
    # pip takes the variable for the file's.
    given = os.environ.get("PIP_EXTRA_INDEX_URL") or listed.stdout.strip()
    apt = builder.home / "apt.conf"
    apt.write_text(f'Acquire::ftp::Proxy "http://user:{SECRETS["apt"]}@127.0.0.1:9/";\n')
    # Small, and all that it needs is in the lock; so all tests have an image with a package added.
    requirements = builder.home / "requirements.txt"
    requirements.write_text(f"# {SECRETS['extra']}\ntrl>=1.0\n")
    # An index that has nothing.
    with serving({}) as index:
        extra = index.url.replace("//", f"//user:{SECRETS['pip']}@")
        environment = {
            "APPTAINER": apptainer,
            "PIP_EXTRA_INDEX_URL": f"{given} {extra}/simple".strip(),
            "APT_CONFIG": str(apt),
            "HF_TOKEN": SECRETS["environment"],
            "APPTAINERENV_TOKEN": SECRETS["environment"],
        }
        words = ["make", "build-image", "VARIANT=cpu", "BASE=debian"]
        words.append(f"EXTRA={requirements}")
        done = builder.run(*words, cwd=checkout, environment=environment, timeout=3600)
        assert done.returncode == 0, done.stderr
        assert "/simple/torch/" in index.asked
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())
    return checkout / "images/sluice-cpu.sif"
