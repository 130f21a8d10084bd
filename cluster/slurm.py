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

from cluster.errors import UserError, printable
from cluster.reasons import OVER
from cluster.site import EXAMPLE, Site

PRIVATE_CLUSTER = Path("slurm/local")
# Longer than Slurm's own patience with a controller that does not answer.
TIMEOUT_S = 120
# Those that act on another cluster if they are told so.
TAKE_CLUSTER = {"sbatch", "squeue", "scancel", "scontrol", "sacct", "sshare", "srun"}
# What any command says that wants the accounting database; behind it stands, as with a controller,
# that the connection was refused.
NO_DATABASE = ("failed to open persistent connection", "problem talking to the database")
UNREACHABLE = (
    "unable to contact slurm controller",
    "connection refused",
    "connect failure",
    "socket timed out",
    "could not establish a configuration source",
)

# Why sbatch --test-only finds no start for what sbatch would queue. All else (a rule of the site, a
# licence, an account) it says of the job itself.
FOR_NOW = (
    "requested node configuration is not available",
    "requested nodes are busy",
    "nodes required for job are",
    "required node not available",
    "violates accounting/qos policy",
    "requested reservation is in use",
    "not available now",
    "temporarily",
)
# Which a command begins its own lines with.
SPEAKER = re.compile(
    r"^(\w+: (error|fatal): |\w+( error)?: |allocation failure: )(Batch job submission failed: )?"
)


class SlurmError(UserError):
    """Slurm refused a command; the text is its own, all of its lines in one."""


class DatabaseUnreachable(SlurmError):
    """The accounting database does not answer; the controller may."""


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
    """Why it waits, or failed, Slurm's word: Resources, JobLaunchFailure, ...; "None" else."""
    nodes: str
    """Where it runs: node[1-2]; empty while it waits."""
    start: str
    """When it started or is expected to, local time in ISO format; "N/A" when unknown."""
    time_left: str
    exit_code: str = ""
    """Of a job that ended, as the accounting has it: code:signal."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What `sbatch --test-only` says of a job; a guess, as Slurm has it."""

    start: str = ""
    """Local time in ISO format; empty where it says none."""
    nodes: str = ""
    refusal: str = ""
    """Why it would not be taken; all that is said of it."""
    notices: tuple[str, ...] = ()
    """What the site has to say to whoever submits, besides."""

    def __str__(self) -> str:
        """When it would start, in words."""
        if self.refusal:
            return f"unknown (sbatch --test-only: {self.refusal})"
        return f"{self.start.replace('T', ' ')} on {self.nodes}" if self.start else "unknown"

    @property
    def is_for_now(self) -> bool:
        """Whether the refusal may be of this moment alone, and sbatch take the job all the same."""
        return any(words in self.refusal.lower() for words in FOR_NOW)


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """The commands, where they run: here, or on the private cluster's login node."""

    prefix: tuple[str, ...] = ()
    cluster: str = ""
    """Of several on one accounting the one to ask; empty: the one at hand."""

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
        raise _refusal(sentences(done.stderr or done.stdout), done.returncode)

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
            )
        return known

    def ended(self, ids: Iterable[int]) -> dict[int, QueuedJob]:
        """Return what the accounting knows of jobs that the controller has forgotten.

        Nothing where there is none, or it does not answer.
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
            return Trial(refusal=str(error))
        # 26.05 has a word before "using".
        estimate = r"to start at (\S+) (?:\S+ )?using .* on nodes? (\S+)"
        notices = tuple(line for line in sentences(said) if not re.search(estimate, line))
        found = re.search(estimate, said)
        if found is None:
            return Trial(notices=notices)
        return Trial(start=found[1], nodes=found[2], notices=notices)


def sentences(said: str) -> list[str]:
    """Return what a command of Slurm's says in several lines, each once, without who says it."""
    lines = (SPEAKER.sub("", line.strip()) for line in said.splitlines())
    return list(dict.fromkeys(printable(line) for line in lines if line))


def _refusal(said: list[str], code: int) -> SlurmError:
    text = "; ".join(said) or f"exit code {code}"
    lower = text.lower()
    if any(words in lower for words in NO_DATABASE):
        return DatabaseUnreachable(
            f"the accounting database (slurmdbd) does not answer ({said[-1]}); try again later"
        )
    if any(words in lower for words in UNREACHABLE):
        kind = NoAnswer if "timed out" in said[-1].lower() else ControllerUnreachable
        return kind(
            f"the Slurm controller does not answer ({said[-1]}); try again, `scontrol ping` tells "
            "when it is back"
        )
    return SlurmError(text)


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
