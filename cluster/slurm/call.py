"""Slurm's commands, their output as Python values; in formats of all releases since 22.05."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.site.settings import EXAMPLE, Site
from cluster.slurm.reasons import OVER
from cluster.slurm.refusals import (
    ControllerUnreachable,
    DatabaseUnreachable,
    NoAnswer,
    SlurmError,
    Trial,
    refusal,
    sentences,
)
from runfolder.errors import UserError

PRIVATE_CLUSTER = Path("slurm/local")
# What a job may see of the submitter's environment; all else stays on the login node.
PASSED = re.compile(
    "PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_[A-Z]+|TZ|SLURM_CONF|SBATCH_(ACCOUNT|RESERVATION)"
    "|MODULEPATH|MODULESHOME|LMOD_(PKG|CMD|DIR)|SLUICE_(CLUSTER(_INSIDE)?|PAUSE_AT)"
    "|(NCCL|GLOO|TORCH_NCCL)_[A-Z0-9_]+|TORCH_DISTRIBUTED_DEBUG|PYTORCH_(CUDA_)?ALLOC_CONF"
)
# Longer than Slurm's own timeout for a controller that does not answer.
TIMEOUT_S = 120
# Those that take --clusters.
TAKE_CLUSTER = {"sbatch", "squeue", "scancel", "scontrol", "sacct", "sshare", "srun"}


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """What squeue says about a job."""

    job_id: int
    state: str
    """RUNNING, PENDING, COMPLETING, ...: Slurm's word."""
    folder: str
    """Its working directory: its run's folder."""
    reason: str
    """Why it waits, or failed, in Slurm's words: Resources, JobLaunchFailure, ...; or "None"."""
    nodes: str
    """Where it runs: node[1-2]; empty while it waits."""
    start: str
    """When it started or is expected to, local time in ISO format; "N/A" when unknown."""
    time_left: str
    cluster: str = ""
    """Which one was asked, of several; empty: the local one."""
    exit_code: str = ""
    """Of a job that ended, from the accounting: code:signal."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Slurm's commands, run here or on the private cluster's login node."""

    prefix: tuple[str, ...] = ()
    cluster: str = ""
    """The one to ask, if several share one accounting database; empty: the local one."""

    @classmethod
    def from_site(cls, site: Site) -> Slurm:
        """Return the Slurm of this site.

        Raises:
            UserError: there is none here.
        """
        if site.is_private and os.environ.get("SLUICE_CLUSTER_INSIDE") != "1":
            if not private_folder().is_dir():
                raise UserError(
                    f"there is no site.toml, and no private cluster is running: make cluster-up "
                    f"starts one; for a real one: cp {EXAMPLE} site.toml, and edit it"
                )
            return cls(prefix=(str(PRIVATE_CLUSTER / "exec.sh"),))
        if shutil.which("sbatch") is None:
            raise UserError("sbatch is not on the PATH; log in to a login node of the cluster")
        return cls()

    def words(self, *command: str) -> list[str]:
        """Return a command's words for this cluster."""
        if self.cluster and command[0] in TAKE_CLUSTER:
            return [command[0], f"--clusters={self.cluster}", *command[1:]]
        return list(command)

    def call(
        self,
        *command: str,
        environment: Mapping[str, str] | None = None,
        with_stderr: bool = False,
    ) -> str:
        """Run a command and return what it prints.

        Raises:
            SlurmError: it failed; `ControllerUnreachable` or `DatabaseUnreachable` if there was
                no answer.
        """
        try:
            done = subprocess.run(
                [*self.prefix, *self.words(*command)],
                env=_plain() if environment is None else environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError:
            raise SlurmError(f"{command[0]} is not on the PATH") from None
        except subprocess.TimeoutExpired:
            raise NoAnswer(
                f"{command[0]} got no answer in {TIMEOUT_S} s; `scontrol ping` asks the controller"
            ) from None
        if done.returncode == 0:
            return done.stdout + done.stderr if with_stderr else done.stdout
        # scontrol reports on stdout what it did not find.
        raise refusal(command[0], done.stderr or done.stdout, done.returncode)

    def jobs(self, ids: Iterable[int]) -> dict[int, QueuedJob]:
        """Return the jobs with these IDs that Slurm still knows."""
        known: dict[int, QueuedJob] = {}
        wanted = sorted(set(ids))
        if not wanted:
            return known
        # squeue fails for a single job that it has forgotten, but silently drops it from a list.
        several = ",".join(map(str, [*wanted, wanted[0]]))
        layout = "%i|%T|%N|%S|%L|%r|%Z"
        try:
            listed = self.call("squeue", "-h", "--states=all", f"--jobs={several}", "-o", layout)
        except ControllerUnreachable:
            raise
        except SlurmError as error:
            if "invalid job id" in str(error).lower():
                return known
            raise
        for job_id, state, nodes, start, left, reason, folder in _rows(listed, 7):
            # Of an array or a heterogeneous job, which are not ours, any part will do.
            known[job_id] = QueuedJob(
                job_id=job_id,
                state=state,
                folder=folder,
                reason=reason.strip(),
                nodes=nodes,
                start=start,
                time_left=left,
                cluster=self.cluster,
            )
        return known

    def ended(self, ids: Iterable[int]) -> dict[int, QueuedJob]:
        """Return what the accounting knows about jobs that the controller has forgotten.

        Nothing if the site keeps no accounting, or it does not answer.
        """
        wanted = ",".join(map(str, sorted(set(ids))))
        if not wanted:
            return {}
        layout = "--format=JobIDRaw,State,ExitCode,NodeList,Start,WorkDir"
        try:
            listed = self.call(
                "sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={wanted}", layout
            )
        except SlurmError:
            return {}
        return {
            job_id: QueuedJob(
                job_id=job_id,
                # CANCELLED by 1000
                state=state.split(" ")[0],
                folder=folder,
                reason="None",
                nodes="" if "assigned" in nodes else nodes,
                start=start,
                time_left="",
                cluster=self.cluster,
                exit_code=code,
            )
            for job_id, state, code, nodes, start, folder in _rows(listed, 6)
            # A job whose end has not reached the database is unknown.
            if state.split(" ")[0] in OVER
        }

    def config(self) -> dict[str, str]:
        """Return slurm.conf as the controller has it."""
        shown = self.call("scontrol", "show", "config")
        return dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", shown, re.MULTILINE))

    def name(self) -> str:
        """Return the cluster's name; empty if Slurm does not show it."""
        return self.config().get("ClusterName", "")

    def trial(self, sbatch: list[str], environment: Mapping[str, str]) -> Trial:
        """Ask when a job would start, without queueing it.

        Slurm accepts jobs here that a limit then holds forever, and treats a drained node as one
        that does not exist: only its times are useful.
        """
        try:
            words = [sbatch[0], "--test-only", *sbatch[1:]]
            said = self.call(*words, environment=environment, with_stderr=True)
        except (ControllerUnreachable, DatabaseUnreachable):
            raise
        except SlurmError as error:
            return Trial(refused=error.said)
        # 26.05 has a word before "using".
        estimate = r"to start at (\S+) (?:\S+ )?using .* on nodes? (\S+)"
        notices = tuple(line for line in sentences(said) if not re.search(estimate, line))
        found = re.search(estimate, said)
        if found is None:
            return Trial(notices=notices)
        return Trial(start=found[1], nodes=found[2], notices=notices)


def _rows(listed: str, columns: int) -> Iterator[tuple[Any, ...]]:
    """Return the lines of a table whose first column is a job ID; the last may contain bars.

    For an array task (12_1) or a component of a heterogeneous job (12+0), the ID of the whole job.
    """
    for line in listed.splitlines():
        first, *rest = line.split("|", columns - 1)
        number = re.match(r"\d{1,18}", first)
        if number and len(rest) == columns - 1:
            yield int(number[0]), *rest


def _plain() -> dict[str, str]:
    """Return the environment without the user's own filters and formats for Slurm's commands."""
    own = re.compile("(SLURM|SQUEUE|SINFO|SCONTROL|SACCT|SACCTMGR|SSHARE)_(?!CONF$).*")
    return {key: value for key, value in os.environ.items() if not own.fullmatch(key)}


def private_folder() -> Path:
    """Return the folder of the private cluster, which exists while it runs."""
    return Path(os.environ.get("SLUICE_CLUSTER", ".cluster"))
