"""`make logs`: follow a run, through all its attempts, until it is over."""

from __future__ import annotations

import time
from pathlib import Path

from cluster.commands.newest_job import GRACE_S, NewestJob
from cluster.commands.tail import Screen, Tail
from cluster.errors import Parser
from cluster.plan import resolve
from cluster.runs import folders, history
from cluster.slurm.reasons import ACTIVE, WAITING, waits
from runfolder import attempts, exit_codes, files
from runfolder.errors import UserError

POLL_S = 1.0
# Prefixes of the lines in batch.log that are written before the processes start.
BEFORE_TRAINING = (b"attempt ", b"preflight")


def main(argv: list[str]) -> int:
    """Follow a run; return 0 if it finished, 75 if it stopped, and 1 if it failed."""
    parser = Parser(
        prog="python -m cluster logs",
        description="Follow a run until it is over; Ctrl+C leaves it alone.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", default="", help="which run")
    parser.add_argument("--node", default="", help="show this node's output (default: 0)")
    options = parser.parse_args(argv)
    if not options.run:
        raise UserError("make logs: RUN= is missing; make status lists the runs")
    folder = folders.find(options.run)
    node = files.number(int(options.node)) if options.node.isdecimal() else None
    if options.node and node is None:
        raise UserError(f"NODE={options.node}: is not a node number; the first node is 0")
    screen = Screen()
    try:
        if not (folder / "jobs.jsonl").exists():
            return _show_local(folder, node or 0, screen)
        return Follower(folder, node or 0, screen).follow()
    except KeyboardInterrupt:
        name = history.name_of(folder)
        screen.say(f"detached; the job continues. To follow it again: make logs RUN={name}")
        return 0


class Follower:
    """Shows the attempts of a run one after the other, as they start."""

    def __init__(self, folder: Path, node: int, screen: Screen) -> None:
        self._folder = folder
        self._node = node
        self._screen = screen
        self._queue = NewestJob(folder)
        self._tails: list[Tail] = []
        self._slurm_tail: tuple[int, Tail] | None = None
        self._attempt = 0
        self._waited = ""
        self._waiting_since: dict[int, float] = {}
        nodes = self._queue.last.num_nodes
        if nodes is not None and node >= nodes:
            raise UserError(
                f"NODE={node}: the run has {nodes} nodes, 0 to {nodes - 1}"
                if nodes > 1
                else f"NODE={node}: the run has one node, 0"
            )

    def follow(self) -> int:
        """Show all until the run is over; return the exit code."""
        for number in attempts.numbers(self._folder)[:-1]:
            self._screen.say(_summary(attempts.read(self._folder, number)))
            self._attempt = number
        while True:
            # First the queue, then the files: a job that is over by then writes nothing more.
            answered, shown = self._queue.ask(), self._attempt
            came = self._show_news()
            # The answer does not apply to an attempt that began in the meantime.
            if answered and self._attempt == shown:
                self._say_waiting()
            if not came and self._queue.is_over and not self._show_news():
                return self._end()
            if not self._screen.has_reader():
                raise BrokenPipeError
            time.sleep(POLL_S)

    def _show_news(self) -> bool:
        """Show what was added since the last time; return whether anything was."""
        came = self._show_slurm_log()
        came |= self._show_tails()
        for number in attempts.numbers(self._folder):
            if number > self._attempt:
                attempt = attempts.read(self._folder, number)
                if not self._is_ready(attempt):
                    break
                # The last lines of the previous attempt.
                self._show_tails()
                self._screen.say(_ruler(attempt))
                self._attempt, self._waited = number, ""
                batch = Tail(attempt.folder / "batch.log")
                self._tails = [Tail(attempt.folder / f"node-{self._node}.log"), batch]
                # The batch script writes before the processes and after them.
                batch.show_first(self._screen, BEFORE_TRAINING)
                self._show_tails()
                came = True
        return came

    def _is_ready(self, attempt: attempts.Attempt) -> bool:
        """Whether an attempt has its record, or will not get one."""
        since = self._waiting_since.setdefault(attempt.number, time.monotonic())
        logs = any(attempt.folder.glob("*.log"))
        return attempt.slurm is not None or logs or time.monotonic() - since >= GRACE_S

    def _show_tails(self) -> bool:
        came = [tail.show(self._screen) for tail in self._tails]
        return any(came)

    def _show_slurm_log(self) -> bool:
        job_id = self._queue.last.job_id
        if self._slurm_tail is None or self._slurm_tail[0] != job_id:
            self._slurm_tail = (job_id, Tail(history.slurm_log(self._folder, job_id)))
        return self._slurm_tail[1].show(self._screen)

    def _say_waiting(self) -> None:
        job = self._queue.job
        line = ""
        if job is not None and job.state in WAITING:
            why = waits(job.reason, job.start, job.job_id, job.cluster)
            line = f"job {job.job_id} waits: {why}"
        elif job is not None and ACTIVE.get(job.state) == "starting":
            line = f"job {job.job_id} waits: its nodes are being started"
        if line and line != self._waited:
            self._screen.say(line)
        self._waited = line

    def _end(self) -> int:
        made = attempts.read_all(self._folder)
        end = history.ending(self._folder, self._queue.last, made, self._queue.job)
        own = [attempt for attempt in made if attempt.is_of(self._queue.last.job_id)]
        log = history.slurm_log(self._folder, self._queue.last.job_id)
        if own:
            # The preflight's findings and the batch script's messages are in batch.log.
            names = [f"node-{self._node}.log", "batch.log"]
            logs = [own[-1].folder / name for name in names]
            log = next((path for path in logs if path.exists()), log)
        self._screen.say(f"---- {_last_words(self._folder, end, log)}")
        return exit_codes.of_outcome(end.word)


def _show_local(folder: Path, node: int, screen: Screen) -> int:
    """Show the logs of a run that `make run` made."""
    screen.say(f"{history.name_of(folder)} ran without Slurm (make run); its logs:")
    for number in attempts.numbers(folder):
        attempt = attempts.read(folder, number)
        screen.say(f"---- attempt {number} ----")
        Tail(attempt.folder / f"node-{node}.log").show(screen)
        screen.say(f"---- {_summary(attempt)}")
    return 0


def _summary(attempt: attempts.Attempt) -> str:
    """Return a line on an attempt that is over."""
    words = [f"attempt {attempt.number}:"]
    if attempt.slurm is not None:
        words.append(f"job {attempt.slurm.get('job_id', '?')}{_on(attempt)},")
    outcome = attempt.outcome
    if outcome is None:
        return " ".join([*words, "did not record how it ended"])
    words.append(files.text(outcome.get("outcome")) or "?")
    if (step := files.number(outcome.get("step"))) is not None:
        words.append(f"at step {step}")
    if reason := history.reason_of(outcome):
        words.append(f"({reason})")
    return " ".join(words)


def _ruler(attempt: attempts.Attempt) -> str:
    if attempt.slurm is None:
        return f"---- attempt {attempt.number} ----"
    job_id, step = (files.number(attempt.slurm.get(key)) for key in ("job_id", "step"))
    start = f", from step {'?' if step is None else step}"
    if "saved" in attempt.slurm:
        # Only its script knows from where it goes on.
        start = ""
    job = "?" if job_id is None else job_id
    return f"---- attempt {attempt.number}: job {job}{_on(attempt)}{start} ----"


def _on(attempt: attempts.Attempt) -> str:
    nodes = attempt.nodes
    if len(nodes) > 8:
        return f" on {nodes[0]} ... {nodes[-1]} ({len(nodes)} nodes)"
    return f" on {' '.join(nodes)}" if nodes else ""


def _last_words(folder: Path, end: history.Ending, log: Path) -> str:
    """Return how a run ended and the next command."""
    name = history.name_of(folder)
    at = f" at step {end.step}" if end.step is not None else ""
    reason = f" ({end.why})" if end.why else ""
    again = f"make submit RUN={name} {history.next_start(folder)}"
    if end.word == "finished":
        command = history.command_of(end.outcome, name)
        return f"finished{at}; next: {command}" if command else f"finished{at}; it is in {folder}"
    if end.word == "stopped":
        return f"stopped{at}{reason}; {again}"
    if end.word == "cancelled":
        return f"cancelled{at}{reason}; {again}"
    said = "ended in an unknown way" if end.word == "?" else end.word
    where = f"; log: {resolve.short(log)}" if log.exists() else ""
    return f"{said}{at}{reason}{where}; {again}"
