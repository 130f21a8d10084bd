"""What Slurm's commands say when they fail, and what `sbatch --test-only` says of a job."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from runfolder.errors import UserError, printable

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
# licence, an account, a limit) sbatch says for real, too.
FOR_NOW = (
    "requested node configuration is not available",
    "requested nodes are busy",
    "nodes required for job are",
    "required node not available",
    "requested reservation is in use",
    "not available now",
    "temporarily unable",
)
# Beyond limits of the user's, of which that of how many jobs may be queued passes.
POLICY = "violates accounting/qos policy"
# What a command begins its own lines with. Any other word with a colon is somebody's sentence.
SPEAKER = re.compile(
    r"^((sbatch|squeue|scancel|scontrol|sacct|sacctmgr|sshare|sinfo|srun): ((error|fatal): )?"
    r"|(error|fatal): |slurm_\w+( error)?: |allocation failure: )?(Batch job submission failed: )?"
)


class SlurmError(UserError):
    """Slurm refused a command; the text is its own, all of its lines in one."""

    def __init__(self, text: str, said: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.said = tuple(said) or (text,)
        """Its sentences; the last is the command's own, those before may be a plugin's."""


class DatabaseUnreachable(SlurmError):
    """The accounting database does not answer; the controller may."""


class ControllerUnreachable(SlurmError):
    """Nothing answers at the controller's address; it may come back."""


class NoAnswer(ControllerUnreachable):
    """The command was sent and not answered: whether it was carried out is unknown."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What `sbatch --test-only` says of a job; a guess, as Slurm has it."""

    start: str = ""
    """Local time in ISO format; empty where it says none."""
    nodes: str = ""
    refused: tuple[str, ...] = ()
    """The sentences with which it would not be taken; the last is sbatch's own."""
    notices: tuple[str, ...] = ()
    """What the site has to say to whoever submits, besides."""

    def __str__(self) -> str:
        """When it would start, in words."""
        if self.refusal:
            return f"unknown (sbatch --test-only: {self.refusal})"
        return f"{self.start.replace('T', ' ')} on {self.nodes}" if self.start else "unknown"

    @property
    def refusal(self) -> str:
        """Why it would not be taken, all that is said of it; empty if it would."""
        return "; ".join(self.refused)

    @property
    def is_for_now(self) -> bool:
        """Whether the refusal may be of this moment alone, and sbatch take the job all the same."""
        return self.is_because_of(*FOR_NOW)

    def is_because_of(self, *words: str) -> bool:
        """Whether sbatch's own sentence has one of these words; a plugin's do not count."""
        return _has(self.refused[-1:], words)


def sentences(said: str) -> list[str]:
    """Return what a command of Slurm's says in several lines, without who says it.

    Of what is said twice the last counts: the command itself speaks last.
    """
    lines = (SPEAKER.sub("", line.strip()) for line in said.splitlines())
    return list(dict.fromkeys([printable(line) for line in lines if line][::-1]))[::-1]


def refusal(command: str, text: str, code: int) -> SlurmError:
    """Return what a command has failed with, and said."""
    said = sentences(text)
    if not said:
        return SlurmError(f"exit code {code}")
    # Before sbatch itself, a plugin of the site may have spoken, of anything.
    own = said[-1:] if command == "sbatch" else said
    if _has(own, NO_DATABASE):
        return DatabaseUnreachable(
            f"the accounting database (slurmdbd) does not answer ({said[-1]}); try again later"
        )
    if _has(own, UNREACHABLE):
        kind = NoAnswer if "timed out" in said[-1].lower() else ControllerUnreachable
        return kind(
            f"the Slurm controller does not answer ({said[-1]}); try again, `scontrol ping` tells "
            "when it is back"
        )
    return SlurmError("; ".join(said), said)


def _has(said: Sequence[str], words: Sequence[str]) -> bool:
    return any(each in sentence.lower() for sentence in said for each in words)
