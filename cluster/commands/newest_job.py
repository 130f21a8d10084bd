"""What Slurm says of a run's newest job while its log is followed, and when that is complete."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from cluster.runs import clusters, history
from cluster.site.file import load_site
from cluster.slurm.call import QueuedJob, Slurm
from cluster.slurm.reasons import ACTIVE
from cluster.slurm.refusals import SlurmError
from runfolder import attempts, records
from runfolder.errors import UserError

QUEUE_POLL_S = 5.0
SILENT_POLL_S = 30.0
# A job's last output reaches a shared file system some seconds after Slurm says that it is over;
# and an attempt's folder some seconds before its record.
GRACE_S = 10.0
# NFS may show a new file half a minute late if the folder was listed before.
LAST_WORD_GRACE_S = 45.0


class NewestJob:
    """The job that was submitted last for a run, asked after every few seconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._asked = -QUEUE_POLL_S
        self._said_silent = False
        self._over_since: float | None = None
        self._there: tuple[str, Slurm] | None = None
        self.last = _newest(folder)
        self.job: QueuedJob | None = None
        self.absent: UserError | None = None
        """The error, if there is no Slurm here to ask."""

    def ask(self) -> bool:
        """Ask if it is time to; return whether there is an answer."""
        now = time.monotonic()
        if now - self._asked < QUEUE_POLL_S:
            return False
        first, self._asked = self._asked < 0, now
        # After another `make submit`, the log is that job's.
        if (found := records.submissions(self._folder)) and found[-1] != self.last:
            self.last, self._over_since = found[-1], None
        if first and history.is_final(self.last, attempts.read_all(self._folder)):
            # A run of last month is shown even if no Slurm answers.
            self._over_since = now
            return True
        try:
            self.job = self._look()
        except SlurmError as error:
            if not self._said_silent:
                print(f"note: {error}; the log continues meanwhile", file=sys.stderr, flush=True)
            self._said_silent = True
            # Each call to a controller that does not answer holds up the log until Slurm gives up.
            self._asked = time.monotonic() + SILENT_POLL_S - QUEUE_POLL_S
            return False
        except UserError as error:
            self.absent = error
            return False
        self._said_silent = False
        if self.job is not None and self.job.state in ACTIVE:
            self._over_since = None
        elif self._over_since is None:
            # A job that Slurm has forgotten ended minutes ago.
            self._over_since = -LAST_WORD_GRACE_S if first and self.job is None else now
        return True

    @property
    def is_over(self) -> bool:
        """Whether the job is over and all that it wrote can be read."""
        made = attempts.read_all(self._folder)
        if self.absent is not None:
            if not history.is_settled(self.last, made):
                raise self.absent
            return True
        if self._over_since is None:
            return self._said_silent and history.is_final(self.last, made)
        waited_s = time.monotonic() - self._over_since
        own = [attempt for attempt in made if attempt.is_of(self.last.job_id)]
        is_owing = bool(own) and own[-1].outcome is None
        grace_s = LAST_WORD_GRACE_S if is_owing else GRACE_S
        return waited_s >= grace_s or history.is_settled(self.last, made)

    def _look(self) -> QueuedJob | None:
        if self._there is None or self._there[0] != self.last.cluster:
            queue = clusters.at(Slurm.from_site(load_site()), self.last.cluster)
            self._there = self.last.cluster, queue
        return clusters.look(self._there[1], {self._folder: self.last}).get(self._folder)


def _newest(folder: Path) -> records.Submission:
    found = records.submissions(folder)
    if not found:
        raise UserError(
            f"{folder / 'jobs.jsonl'}: has no readable entry for a job; squeue --me lists your jobs"
        )
    return found[-1]
