"""Slurm's commands, their answers as Python values; text that all releases since 22.05 print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.site.file import EXAMPLE
from cluster.site.settings import Site
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
# Longer than Slurm's own patience with a controller that does not answer.
TIMEOUT_S = 120
# Those that act on another cluster if they are told so.
TAKE_CLUSTER = {"sbatch", "squeue", "scancel", "scontrol", "sacct", "sshare", "srun"}


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """What squeue says of a job."""

    job_id: int
    state: str
    """RUNNING, PENDING, COMPLETING, ...: Slurm's word."""
    folder: str
    """Its working directory: that of its run."""
    reason: str
    """Why it waits, or failed, Slurm's word: Resources, JobLaunchFailure, ...; "None" else."""
    nodes: str
    """Where it runs: node[1-2]; empty while it waits."""
    start: str
    """When it started or is expected to, local time in ISO format; "N/A" when unknown."""
    time_left: str
    cluster: str = ""
    """Which one was asked, of several; empty: the one at hand."""
    exit_code: str = ""
    """Of a job that ended, as the accounting has it: code:signal."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """The commands, where they run: here, or on the private cluster's login node."""

    prefix: tuple[str, ...] = ()
    cluster: str = ""
    """Of several on one accounting the one to ask; empty: the one at hand."""

    @classmethod
    def from_site(cls, site: Site) -> Slurm:
        """Return Slurm as this site has it.

        Raises:
            UserError: there is none here.
        """
        if site.is_private and os.environ.get("SLUICE_CLUSTER_INSIDE") != "1":
            if not private_folder().is_dir():
                raise UserError(
                    f"there is no site.toml, and no private cluster runs here: make cluster-up "
                    f"starts one; for a real one: cp {EXAMPLE} site.toml, and edit it"
                )
            return cls(prefix=(str(PRIVATE_CLUSTER / "exec.sh"),))
        if shutil.which("sbatch") is None:
            raise UserError("sbatch is not on the PATH; log in to a login node of the cluster")
        return cls()

    def words(self, *command: str) -> list[str]:
        """Return a command as it is given to this cluster."""
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
                f"{command[0]} had no answer for {TIMEOUT_S} s; `scontrol ping` asks the controller"
            ) from None
        if done.returncode == 0:
            return done.stdout + done.stderr if with_stderr else done.stdout
        # scontrol says on stdout what it did not find.
        raise refusal(command[0], done.stderr or done.stdout, done.returncode)

    def jobs(self, ids: Iterable[int]) -> dict[int, QueuedJob]:
        """Return those of these jobs that Slurm still knows."""
        known: dict[int, QueuedJob] = {}
        wanted = sorted(set(ids))
        if not wanted:
            return known
        # Asked for one job that it has forgotten, squeue fails; a list it thins out silently.
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
        """Return what the accounting knows of jobs that the controller has forgotten.

        Nothing where the site keeps no accounting, or it does not answer.
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
            # What the database has not heard the end of is unknown.
            if state.split(" ")[0] in OVER
        }

    def config(self) -> dict[str, str]:
        """Return slurm.conf as the controller has it."""
        shown = self.call("scontrol", "show", "config")
        return dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", shown, re.MULTILINE))

    def name(self) -> str:
        """Return the cluster's name; empty where it does not tell."""
        return self.config().get("ClusterName", "")

    def trial(self, sbatch: list[str], environment: Mapping[str, str]) -> Trial:
        """Ask when a job would start, without queueing it.

        It lets limits pass that then hold the job for ever, and takes a node that is drained for
        one that is not there: only its times are worth something.
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
    """Return the lines of a table whose first column is a job's number; the last may hold bars.

    Of the task of an array (12_1) or of a part of a heterogeneous job (12+0) that of the whole.
    """
    for line in listed.splitlines():
        first, *rest = line.split("|", columns - 1)
        number = re.match(r"\d{1,18}", first)
        if number and len(rest) == columns - 1:
            yield int(number[0]), *rest


def _plain() -> dict[str, str]:
    """Return the environment without the user's own filters and layouts of Slurm's commands."""
    own = re.compile("(SLURM|SQUEUE|SINFO|SCONTROL|SACCT|SACCTMGR|SSHARE)_(?!CONF$).*")
    return {key: value for key, value in os.environ.items() if not own.fullmatch(key)}


def private_folder() -> Path:
    """Return the folder of the private cluster, which is there while it runs."""
    return Path(os.environ.get("SLUICE_CLUSTER", ".cluster"))
