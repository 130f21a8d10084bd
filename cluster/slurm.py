"""Slurm's commands, their answers as Python values; text that all releases since 22.05 print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError
from cluster.site import EXAMPLE, Site

PRIVATE_CLUSTER = Path("slurm/local")
# Longer than Slurm's own patience with a controller that does not answer.
TIMEOUT_S = 120
UNREACHABLE = (
    "unable to contact slurm controller",
    "connection refused",
    "connect failure",
    "socket timed out",
    "could not establish a configuration source",
)


class SlurmError(UserError):
    """Slurm refused a command; the text is its own last line."""


class ControllerUnreachable(SlurmError):
    """Nothing answers at the controller's address; it may come back."""


class NoAnswer(ControllerUnreachable):
    """The command was sent and not answered: whether it was carried out is unknown."""


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """What squeue says of a job."""

    job_id: int
    state: str
    """RUNNING, PENDING, COMPLETING, ...: Slurm's word."""
    folder: str
    """Its working directory: that of its run."""
    reason: str
    """Why it waits, Slurm's word: Resources, Priority, ...; "None" when it does not."""
    nodes: str
    """Where it runs: node[1-2]; empty while it waits."""
    start: str
    """When it started or is expected to, local time in ISO format; "N/A" when unknown."""
    time_left: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What `sbatch --test-only` says of a job; a guess, as Slurm has it."""

    start: str = ""
    """Local time in ISO format; empty where it says none."""
    nodes: str = ""
    refusal: str = ""
    """Why it would not be taken."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """The commands, where they run: here, or on the private cluster's login node."""

    prefix: tuple[str, ...] = ()

    def call(
        self,
        *command: str,
        environment: Mapping[str, str] | None = None,
        with_stderr: bool = False,
    ) -> str:
        """Run a command and return what it prints.

        Raises:
            SlurmError: it failed; `ControllerUnreachable` if nothing answered.
        """
        try:
            done = subprocess.run(
                [*self.prefix, *command],
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
        words = (done.stderr or done.stdout).splitlines()
        lines = [line.strip() for line in words if line.strip()]
        said = lines[-1] if lines else f"exit code {done.returncode}"
        if any(mark in line.lower() for mark in UNREACHABLE for line in lines):
            kind = NoAnswer if "timed out" in said.lower() else ControllerUnreachable
            raise kind(
                f"the Slurm controller does not answer ({said}); try again, `scontrol ping` tells "
                "when it is back"
            )
        raise SlurmError(re.sub(r"^(error|\w+: error|\w+): ", "", said))

    def jobs(self, ids: Iterable[int]) -> dict[int, QueuedJob]:
        """Return those of these jobs that Slurm still knows."""
        known: dict[int, QueuedJob] = {}
        wanted = sorted(set(ids))
        if not wanted:
            return known
        # Asked for one job that it has forgotten, squeue fails; a list it thins out silently.
        several = ",".join(map(str, [*wanted, wanted[0]]))
        # What may have another bar in it comes last.
        layout = "%i|%T|%N|%S|%L|%Z|%r"
        try:
            listed = self.call("squeue", "-h", "--states=all", f"--jobs={several}", "-o", layout)
        except ControllerUnreachable:
            raise
        except SlurmError as error:
            if "invalid job id" in str(error).lower():
                return known
            raise
        for line in listed.splitlines():
            job_id, state, nodes, start, left, folder, reason = line.split("|", 6)
            known[int(job_id)] = QueuedJob(
                job_id=int(job_id),
                state=state,
                folder=folder,
                reason=reason.strip(),
                nodes=nodes,
                start=start,
                time_left=left,
            )
        return known

    def config(self) -> dict[str, str]:
        """Return slurm.conf as the controller has it."""
        shown = self.call("scontrol", "show", "config")
        return dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", shown, re.MULTILINE))

    def trial(self, sbatch: list[str], environment: Mapping[str, str]) -> Trial:
        """Ask when a job would start, without queueing it.

        It lets limits pass that then hold the job for ever, and takes a node that is drained for
        one that is not there: only its times are worth something.
        """
        try:
            words = [sbatch[0], "--test-only", *sbatch[1:]]
            said = self.call(*words, environment=environment, with_stderr=True)
        except ControllerUnreachable:
            raise
        except SlurmError as error:
            return Trial(refusal=str(error))
        # 26.05 has a word before "using".
        found = re.search(r"to start at (\S+) (?:\S+ )?using .* on nodes? (\S+)", said)
        return Trial(start=found[1], nodes=found[2]) if found else Trial()

    def expected_start(self, sbatch: list[str], environment: Mapping[str, str]) -> str:
        """Return in words when a job would start."""
        trial = self.trial(sbatch, environment)
        if trial.refusal:
            return f"unknown (sbatch --test-only: {trial.refusal})"
        return f"{trial.start.replace('T', ' ')} on {trial.nodes}" if trial.start else "unknown"


def _plain() -> dict[str, str]:
    """Return the environment without the user's own filters and layouts of Slurm's commands."""
    own = re.compile("(SLURM|SQUEUE|SINFO|SCONTROL|SACCT|SACCTMGR|SSHARE)_(?!CONF$).*")
    return {key: value for key, value in os.environ.items() if not own.fullmatch(key)}


def of(site: Site) -> Slurm:
    """Return Slurm as this site has it.

    Raises:
        UserError: there is none here.
    """
    if site.is_private and os.environ.get("SLUICE_CLUSTER_INSIDE") != "1":
        folder = Path(os.environ.get("SLUICE_CLUSTER", ".cluster"))
        if not folder.is_dir():
            raise UserError(
                f"there is no site.toml, and no private cluster runs here: make cluster-up "
                f"starts one; for a real one: cp {EXAMPLE} site.toml, and edit it"
            )
        return Slurm(prefix=(str(PRIVATE_CLUSTER / "exec.sh"),))
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on the PATH; log in to a login node of the cluster")
    return Slurm()


def fields_of(line: str) -> dict[str, str]:
    """Return the KEY=VALUE pairs of a line of `scontrol show --oneliner`; values have spaces.

    Of a key that comes twice the first counts: what people write (a reason, a comment) is last,
    and cannot pass for something else.
    """
    _, *parts = re.split(r"(?:^|\s+)([A-Z]\w*(?:/\w+)*)=", line)
    found: dict[str, str] = {}
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        found.setdefault(key, value.strip())
    return found


def number(fields: Mapping[str, str], key: str) -> int | None:
    """Return the whole number that a field holds; None for UNLIMITED, and for what is none."""
    value = fields.get(key, "")
    return int(value) if value.isdecimal() and len(value) < 16 else None


def seconds(time: str) -> int | None:
    """Return a time limit in seconds, None for UNLIMITED.

    Slurm's notations: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes and days-hours:minutes:seconds (man sbatch, --time).

    Raises:
        ValueError: it is none of them.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    if not re.fullmatch(r"(\d+-\d+(:\d\d?){0,2}|\d+(:\d\d?){0,2})", time):
        raise ValueError(f"'{time}' is no time limit")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:
        hours, minutes, secs = 0, parts[0], (*parts, 0)[1]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs
