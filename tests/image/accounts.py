"""Who the tests of the image act as: root, where the tests are root's, and an ordinary user."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
IS_ROOT = os.geteuid() == 0
ORDINARY = "sluice-test"


@dataclass(frozen=True)
class Account:
    """A user, with a folder of its own that others may enter."""

    name: str
    home: Path

    def run(
        self,
        *command: str | Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as this user, with little in its environment."""
        variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "TMPDIR": str(self.home / "tmp"),
            "LANG": "C.UTF-8",
        }
        # How this machine reaches its package sources.
        kept = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_CERT"))}
        identity: dict[str, object] = {}
        if self.name != pwd.getpwuid(os.geteuid()).pw_name:
            entry = pwd.getpwnam(self.name)
            groups = os.getgrouplist(self.name, entry.pw_gid)
            identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            command,
            check=False,
            cwd=cwd or self.home,
            env=variables | kept | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            **identity,
        )

    def own(self, path: Path) -> None:
        """Make everything below `path` this user's."""
        if IS_ROOT:
            subprocess.run(["chown", "-R", self.name, path], check=True)

    def checkout(self, name: str = "sluice") -> Path:
        """Return a checkout of this user's: the files that git has or would take."""
        target = self.home / name
        lay_out(target)
        self.own(target)
        return target


def lay_out(checkout: Path) -> None:
    """Put the files that git has or would take into `checkout`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for file in filter(None, listed.split("\0")):
        if (CHECKOUT / file).is_file():
            (checkout / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / file, checkout / file)


def make_account(name: str) -> Account:
    """Return an account with a new folder; /tmp is the one place that every user may enter."""
    home = Path(tempfile.mkdtemp(prefix=f"sluice-{name}-"))
    home.chmod(0o755)
    (home / "tmp").mkdir()
    account = Account(name=name, home=home)
    account.own(home)
    return account
