"""Who the tests of the image act as: root, where the tests are root's, and an ordinary user."""

from __future__ import annotations

import os
import pwd
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import waiting
from tests.checkout import lay_out
from tests.shared import at_end, once

IS_ROOT = os.geteuid() == 0


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
        timeout: float = waiting.HANGS_AFTER_S,
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
        identity: dict[str, Any] = {}
        if self.name != pwd.getpwuid(os.geteuid()).pw_name:
            entry = pwd.getpwnam(self.name)
            groups = os.getgrouplist(self.name, entry.pw_gid)
            identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}
        return waiting.run(
            command,
            cwd=cwd or self.home,
            env=variables | kept | dict(environment or {}),
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
        lay_out(target, copied=True)
        self.own(target)
        return target


def make_account(name: str) -> Account:
    """Return an account with a new folder; /tmp is the one place that every user may enter."""
    home = Path(tempfile.mkdtemp(prefix=f"sluice-{name}-"))
    home.chmod(0o755)
    (home / "tmp").mkdir()
    account = Account(name=name, home=home)
    account.own(home)
    return account


def ordinary_user() -> str:
    """Return the name of a user who is not root; as root, one is made for the tests."""
    if not IS_ROOT:
        return pwd.getpwuid(os.geteuid()).pw_name

    def make() -> str:
        # Of this run alone: another run on this machine removes its own at its end.
        name = f"sluice-test-{os.getpid()}"
        # With its lines in /etc/subuid and /etc/subgid, which useradd writes.
        subprocess.run(["useradd", "--create-home", name], check=True)
        at_end("userdel", "--remove", "--force", name)
        return name

    return once("ordinary_user", make)


def builder() -> Account:
    """Return the account that builds for all workers."""

    def make() -> str:
        account = make_account(ordinary_user())
        at_end("rm", "-rf", account.home)
        return str(account.home)

    return Account(ordinary_user(), Path(once("builder", make)))


def builder_checkout() -> Path:
    """Return its checkout, with the light environment."""

    def make() -> str:
        account = builder()
        checkout = account.checkout()
        done = account.run("containers/venv.sh", "--base", cwd=checkout)
        assert done.returncode == 0, done.stderr
        return str(checkout)

    return Path(once("builder_checkout", make))
