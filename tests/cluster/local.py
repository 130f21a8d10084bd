"""A private Slurm, as the tests use it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.image.accounts import CHECKOUT

LOCAL = CHECKOUT / "slurm/local"

Result = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Cluster:
    """A private Slurm: its state folder, and the environment that its commands get."""

    folder: Path
    environment: dict[str, str]
    # Who else than the one who started it may submit jobs.
    users: tuple[str, ...] = ()

    def run(
        self,
        *command: str | Path,
        node: str | None = None,
        user: str | None = None,
        timeout: float = 60,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Result:
        """Run a command on the login node, or on `node`, as its owner or as `user`."""
        options = ["--node", node] if node else []
        options += ["--user", user] if user else []
        return subprocess.run(
            [LOCAL / "exec.sh", *options, "--", *command],
            check=False,
            cwd=cwd or self.folder.parent,
            env=self.environment | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def output(self, *command: str | Path, node: str | None = None, user: str | None = None) -> str:
        """Return what a command that has to succeed said."""
        done = self.run(*command, node=node, user=user)
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def local(self, script: str, *arguments: str, timeout: float = 120) -> Result:
        """Run one of the scripts of slurm/local on this cluster."""
        return subprocess.run(
            [LOCAL / script, *arguments],
            check=False,
            cwd="/",
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def drill(self, *words: str) -> str:
        """Let something go wrong, on purpose; returns when it has."""
        done = self.local("drill.sh", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state_of(self, job_id: str) -> str:
        """Return the state of a job as Slurm's controller has it, such as RUNNING."""
        return self.output("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "-o", "%T")

    def wait_for(self, job_id: str, *states: str, timeout: float = 60) -> str:
        """Return the job's state as soon as it is one of `states`."""
        what = f"job {job_id}: {states}"
        wait_until(lambda: self.state_of(job_id) in states, timeout, what, every_s=0.5)
        return self.state_of(job_id)


def wait_until(
    happened: Callable[[], bool], timeout: float, what: str, every_s: float = 0.2
) -> None:
    """Wait until `happened`; fails with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, f"not in {timeout} s: {what}"
        time.sleep(every_s)


def new_cluster(folder: Path, users: tuple[str, ...] = ()) -> Cluster:
    """Return a cluster that is not up yet, in `folder`."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLUICE_", "SLURM_", "MAKE", "MFLAGS")) and key != "ARGS"
    }
    return Cluster(folder, kept | {"SLUICE_CLUSTER": str(folder)}, users)
