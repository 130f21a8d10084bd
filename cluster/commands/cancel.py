"""`make cancel`: end a run's job; a running job saves first."""

from __future__ import annotations

import time
from pathlib import Path

from cluster.errors import Parser
from cluster.runs import clusters, folders, history
from cluster.runs.progress import read_progress
from cluster.site.file import load_site
from cluster.slurm.call import QueuedJob, Slurm
from cluster.slurm.reasons import ACTIVE, WAITING
from cluster.slurm.refusals import ControllerUnreachable, SlurmError
from runfolder import attempts, checkpoints, decision, records
from runfolder.errors import UserError

POLL_S = 2.0
# What a shell says of Ctrl+C.
INTERRUPTED = 130
# After a plain scancel Slurm kills what remains: after KillWait, 30 s by default, and an epilog.
KILL_S = 120
# What scancel says about a job that is just ending or starting; the next look at it tells.
BETWEEN = ("invalid job id", "already complet", "pending execution", "not running", "no longer")
MAX_REFUSALS = 5
SUSPENDED = {"SUSPENDED", "STOPPED"}
NOTHING_TO_SAVE = WAITING | SUSPENDED | {"CONFIGURING", "POWER_UP_NODE"}


def main(argv: list[str]) -> int:
    """End the job of a run; return 0 when it is over."""
    parser = Parser(
        prog="python -m cluster cancel",
        description="End the job of a run; a running job saves first.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", default="", help="which run")
    parser.add_argument("--name", default="", help="all runs of this sweep")
    options = parser.parse_args(argv)
    if options.name:
        return cancel_sweep(options.name)
    if not options.run:
        raise UserError("make cancel: RUN= is missing; make status lists the runs")
    return cancel(options.run)


def cancel_sweep(name: str) -> int:
    """End the jobs of a sweep's runs; return 0 when all are over."""
    code, ended = 0, 0
    # The newest wait for the others; they must not start when those end.
    for folder in reversed(history.runs_of_sweep(name)):
        try:
            code = cancel(history.name_of(folder)) or code
        except NotInQueue:
            continue
        ended += 1
        if code == INTERRUPTED:
            break
    if not ended:
        raise UserError(f"NAME={name}: none of its runs is in the queue; make status NAME={name}")
    return code


class NotInQueue(UserError):
    """There is no job to end."""


def cancel(run: str) -> int:
    """End the job of a run; return 0 when it is over.

    Raises:
        NotInQueue: it has none.
        UserError: it was not submitted, or Slurm does not answer.
    """
    folder = folders.find(run)
    name = history.name_of(folder)
    if not (folder / "jobs.jsonl").exists():
        raise UserError(f"RUN={name}: was not submitted to Slurm; Ctrl+C ends a `make run`")
    found = records.submissions(folder)
    if not found or records.has_damaged_end(folder):
        raise UserError(
            f"{folder / 'jobs.jsonl'}: its last line is damaged; squeue --me lists your jobs, and "
            "scancel ends one"
        )
    settings = load_site()
    last = found[-1]
    queue = clusters.at(Slurm.from_site(settings), last.cluster)
    job = clusters.look(queue, {folder: last}).get(folder)
    if job is None or job.state not in ACTIVE:
        end = history.ending(folder, last, attempts.read_all(folder), job)
        at = f" at step {end.step}" if end.step is not None else ""
        again = "make status" if end.word == "finished" else f"make submit RUN={name} continues it"
        raise NotInQueue(
            f"RUN={name}: job {last.job_id} is no longer in the queue ({end.word}{at}); {again}"
        )
    return Cancellation(folder, job, queue, settings.slurm.save_s).run()


class Cancellation:
    """A cancel request, from its file until the job is over."""

    def __init__(self, folder: Path, job: QueuedJob, queue: Slurm, save_s: int) -> None:
        self._folder = folder
        self._job = job
        self._queue = queue
        self._save_s = save_s
        self._stands = False
        """Whether Slurm was told."""
        self._refusals = 0
        self._said = ""

    def run(self) -> int:
        """Ask, and wait until the job is over; return the exit code."""
        job_id = self._job.job_id
        # An existing request is another `make cancel`'s, which has told Slurm, and needs it.
        ours = not decision.is_cancel_requested(self._folder, job_id)
        try:
            self._write_request()
            saved_in_time = self._until_over()
        except (KeyboardInterrupt, UserError) as error:
            if not self._stands and ours:
                decision.forget_cancel(self._folder)
            if isinstance(error, UserError):
                told = f"; job {job_id} was told to end anyway: make status shows it"
                raise UserError(f"{error}{told if self._stands else ''}") from None
            if self._stands:
                print(f"\nno longer waiting; job {job_id} was told to end: make status shows it")
            else:
                print(f"\njob {job_id} was not cancelled")
            return INTERRUPTED
        decision.forget_cancel(self._folder)
        self._say_end(saved_in_time)
        return 0

    def _until_over(self) -> bool:
        """Wait for the end; return False if the job was ended while it was saving."""
        save_until = kill_until = float("inf")
        told, in_time = "", True
        while self._is_there():
            now, state = time.monotonic(), self._job.state
            if state in NOTHING_TO_SAVE:
                if state in SUSPENDED:
                    self._say("is suspended and cannot save; ending it now")
                if told != "end" and self._scancel():
                    told, kill_until = "end", now + KILL_S
            elif state == "COMPLETING":
                self._stands = True
                save_until = min(save_until, now + self._save_s) if in_time else save_until
                self._say("is ending")
            elif not told and self._scancel("--signal=USR1", "--batch"):
                told, save_until = "save", now + self._save_s
                self._say(f"was asked to save and end; it has {self._save_s} s")
            if now > save_until and self._scancel():
                told, in_time = "end", False
                save_until, kill_until = float("inf"), now + KILL_S
                self._say(f"did not save within {self._save_s} s; Slurm ends it")
            if now > kill_until:
                raise UserError(f"job {self._job.job_id} is still in the queue after {KILL_S} s")
            time.sleep(POLL_S)
        return in_time

    def _is_there(self) -> bool:
        """Look at the job; return whether it is not over."""
        job_id = self._job.job_id
        try:
            found = self._queue.jobs([job_id]).get(job_id)
        except ControllerUnreachable:
            if not self._stands:
                raise
            # Slurm was already told; when the time to save is over, scancel shows if it is back.
            self._say("is still ending; Slurm does not answer at the moment")
            return True
        if found is None:
            return False
        self._job = found
        return found.state in ACTIVE

    def _scancel(self, *flags: str) -> bool:
        """Tell Slurm; return False if the job was between two states, so another look is due."""
        try:
            self._queue.call("scancel", *flags, str(self._job.job_id))
        except SlurmError as error:
            self._refusals += 1
            between = any(words in str(error).lower() for words in BETWEEN)
            if not between or self._refusals > MAX_REFUSALS:
                raise
            return False
        self._stands = True
        return True

    def _write_request(self) -> None:
        try:
            decision.request_cancel(self._folder, self._job.job_id)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from None

    def _say(self, what: str) -> None:
        if what != self._said:
            print(f"job {self._job.job_id} {what}", flush=True)
        self._said = what

    def _say_end(self, saved_in_time: bool) -> None:
        name, job_id = history.name_of(self._folder), self._job.job_id
        made = [a for a in attempts.read_all(self._folder) if a.is_of(job_id)]
        outcome = (made[-1].outcome if made else None) or {}
        if outcome.get("outcome") == "finished":
            command = history.command_of(outcome, name)
            print(f"job {job_id} had already finished" + (f"; next: {command}" if command else ""))
            return
        saved = checkpoints.newest_step(self._folder)
        late = "" if saved_in_time else "; it did not finish saving in time"
        serves = "no checkpoint, it starts over"
        if saved is not None:
            serves = f"checkpoint {checkpoints.folder_name(saved)}"
        came = read_progress(self._folder, made[-1]).step if made else None
        if records.program(self._folder) is not None:
            serves, came = history.next_start(self._folder), None
        if came is not None and (lost := came - (saved or 0)) > 0:
            serves += f"; {lost} step{'s' if lost != 1 else ''} {'are' if lost != 1 else 'is'} lost"
        print(f"job {job_id} is cancelled{late}; continue with make submit RUN={name} ({serves})")
