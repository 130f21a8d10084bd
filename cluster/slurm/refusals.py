"""What Slurm's commands say when they fail, and what `sbatch --test-only` says about a job."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from runfolder.errors import UserError, printable

# What any command prints that needs the accounting database; as with a controller, "connection
# refused" follows.
NO_DATABASE = ("failed to open persistent connection", "problem talking to the database")
UNREACHABLE = (
    "unable to contact slurm controller",
    "connection refused",
    "connect failure",
    "socket timed out",
    "could not establish a configuration source",
)

# Why sbatch --test-only finds no start for a job that sbatch would queue. For all other reasons (a
# rule of the site, a license, an account, a limit) sbatch itself refuses the job, too.
FOR_NOW = (
    "requested node configuration is not available",
    "requested nodes are busy",
    "nodes required for job are",
    "required node not available",
    "requested reservation is in use",
    "not available now",
    "temporarily unable",
)
# Above one of the user's limits, of which the one on the number of queued jobs is temporary.
POLICY = "violates accounting/qos policy"
# Prefixes of a command's own lines. Any other word with a colon is part of a message.
SPEAKER = re.compile(
    r"^((sbatch|squeue|scancel|scontrol|sacct|sacctmgr|sshare|sinfo|srun): ((error|fatal): )?"
    r"|(error|fatal): |slurm_\w+( error)?: |allocation failure: )?(Batch job submission failed: )?"
)


class SlurmError(UserError):
    """Slurm refused a command; the text is Slurm's own, joined into one line."""

    def __init__(self, text: str, said: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.said = tuple(said) or (text,)
        """Its messages; the last is the command's own, those before may be a plugin's."""


class DatabaseUnreachable(SlurmError):
    """The accounting database does not answer; the controller may."""


class ControllerUnreachable(SlurmError):
    """Nothing answers at the controller's address; it may come back."""


class NoAnswer(ControllerUnreachable):
    """The command was sent and not answered: whether it was carried out is unknown."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What `sbatch --test-only` says about a job: Slurm's estimate."""

    start: str = ""
    """Local time in ISO format; empty if it gives none."""
    nodes: str = ""
    refused: tuple[str, ...] = ()
    """The messages with which the job would be refused; the last is sbatch's own."""
    notices: tuple[str, ...] = ()
    """The site's other messages to whoever submits."""

    def __str__(self) -> str:
        """When it would start, in words."""
        if self.refusal:
            return f"unknown (sbatch --test-only: {self.refusal})"
        return f"{self.start.replace('T', ' ')} on {self.nodes}" if self.start else "unknown"

    @property
    def refusal(self) -> str:
        """Why the job would be refused, all messages in one; empty if it would not."""
        return "; ".join(self.refused)

    @property
    def is_for_now(self) -> bool:
        """Whether the refusal may be temporary, and sbatch would still take the job."""
        return self.is_because_of(*FOR_NOW)

    def is_because_of(self, *words: str) -> bool:
        """Whether sbatch's own message has one of these phrases; a plugin's does not count."""
        return _has(self.refused[-1:], words)


def sentences(said: str) -> list[str]:
    """Return the lines of a Slurm command's output, without the command's name.

    Of a repeated line the last one counts: the command's own messages come last.
    """
    lines = (SPEAKER.sub("", line.strip()) for line in said.splitlines())
    return list(dict.fromkeys([printable(line) for line in lines if line][::-1]))[::-1]


def refusal(command: str, text: str, code: int) -> SlurmError:
    """Return the error for a command that failed."""
    said = sentences(text)
    if not said:
        return SlurmError(f"exit code {code}")
    # Before sbatch's own message, a plugin of the site may have printed anything.
    own = said[-1:] if command == "sbatch" else said
    if _has(own, NO_DATABASE):
        return DatabaseUnreachable(
            f"the accounting database (slurmdbd) does not answer ({said[-1]}); try again later"
        )
    if _has(own, UNREACHABLE):
        kind = NoAnswer if "timed out" in said[-1].lower() else ControllerUnreachable
        return kind(
            f"the Slurm controller does not answer ({said[-1]}); try again, `scontrol ping` shows "
            "when it is back"
        )
    return SlurmError("; ".join(said), said)


def _has(said: Sequence[str], words: Sequence[str]) -> bool:
    return any(each in sentence.lower() for sentence in said for each in words)
