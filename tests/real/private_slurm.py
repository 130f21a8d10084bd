"""A private Slurm, as the tests use it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import waiting
from tests.shared import CHECKOUT
from tests.waiting import wait_until

LOCAL = CHECKOUT / "slurm/local"

Result = subprocess.CompletedProcess[str]

# The cluster of an ordinary user is in a user namespace in which that user is not root. Whoever
# enters it has the rights over its mounts, and loses them with exec: `mount` comes too late.
MOUNT = """
import ctypes, os, sys
pid, folder, options = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) != 0:
        sys.exit(f"{name}: {os.strerror(ctypes.get_errno())}")
for space in ("user", "mnt"):
    entered = f"/proc/{pid}/ns/{space}"
    if not os.path.samefile(entered, f"/proc/self/ns/{space}"):
        call("setns", os.open(entered, os.O_RDONLY), 0)
if options:
    call("mount", b"none", folder.encode(), b"tmpfs", ctypes.c_ulong(0), options.encode())
else:
    call("umount2", folder.encode(), 0)
"""


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
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Result:
        """Run a command on the login node, or on `node`, as its owner or as `user`."""
        options = ["--node", node] if node else []
        options += ["--user", user] if user else []
        return waiting.run(
            [LOCAL / "exec.sh", *options, "--", *command],
            cwd=cwd or self.folder.parent,
            env=self.environment | dict(environment or {}),
        )

    def output(self, *command: str | Path, node: str | None = None, user: str | None = None) -> str:
        """Return what a command that has to succeed said."""
        done = self.run(*command, node=node, user=user)
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def local(self, script: str, *arguments: str) -> Result:
        """Run one of the scripts of slurm/local on this cluster."""
        return waiting.run([LOCAL / script, *arguments], cwd="/", env=self.environment)

    @contextmanager
    def full(self, node: str, folder: str) -> Iterator[None]:
        """Have a folder of a node be of 1 MB, as if its disk were full."""
        found = 'source "$1/state.sh"; node_pid "$2" "$3"'
        words = ("bash", "-c", found, "bash", LOCAL, self.folder, node)

        def mount(options: str) -> None:
            pid = waiting.run(words, cwd="/", env=self.environment).stdout.strip()
            change = (sys.executable, "-c", MOUNT, pid, folder, options)
            done = waiting.run(change, cwd="/", env=self.environment)
            assert done.returncode == 0, done.stderr

        mount("size=1M,mode=1777")
        try:
            yield
        finally:
            mount("")

    def drill(self, *words: str) -> str:
        """Let something go wrong, on purpose; returns when it has."""
        done = self.local("drill.sh", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state_of(self, job_id: str) -> str:
        """Return the state of a job as Slurm's controller has it, such as RUNNING."""
        return self.output("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "-o", "%T")

    def wait_for(self, job_id: str, *states: str) -> str:
        """Return the job's state as soon as it is one of `states`."""
        found = ""

        def is_one() -> bool:
            nonlocal found
            found = self.state_of(job_id)
            return found in states

        wait_until(is_one, f"job {job_id}: {states}", so_far=self.queue)
        return found

    def queue(self) -> str:
        """Return the queue and the nodes as Slurm shows them, for a test that waits in vain."""
        return self.run("squeue").stdout + self.run("sinfo", "--long", "--Node").stdout


def new_cluster(folder: Path, users: tuple[str, ...] = ()) -> Cluster:
    """Return a cluster that is not up yet, in `folder`."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLUICE_", "SLURM_", "MAKE", "MFLAGS")) and key != "ARGS"
    }
    return Cluster(folder, kept | {"SLUICE_CLUSTER": str(folder)}, users)


def start_cluster(folder: Path, users: tuple[str, ...], *options: str) -> Cluster:
    """Return a cluster that is up, in `folder`; `options` are those of up.sh.

    SLUICE_TEST_ROOTFS names a system whose Slurm it is, for a look at another release.
    """
    made = new_cluster(folder, users)
    words = [*options, *(("--users", ",".join(users)) if users else ())]
    if rootfs := os.environ.get("SLUICE_TEST_ROOTFS"):
        words += ["--rootfs", rootfs]
    done = made.local("up.sh", *words)
    assert done.returncode == 0, done.stderr
    return made
