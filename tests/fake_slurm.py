"""A queue that the tests write by hand, a clock that runs only while a command waits, run folders.

The real commands are tried on the private cluster (tests/real); here is what no cluster does
when asked, such as being silent, or changing its mind in the middle of a request. Nothing starts a
process and nobody waits: what happens meanwhile, happens while the command sleeps.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.slurm import call

# Of any command: a wait that is longer than the longest of its own limits hangs.
HANGS_AFTER_S = 3600


class Clock:
    """The module `time` of a command; a wait is over at once, and whoever is to act then does."""

    def __init__(self, asleep: Callable[[], None]) -> None:
        self.now = 0.0
        self._asleep = asleep

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < HANGS_AFTER_S, "the command waits for what does not come"
        self._asleep()


class FakeSlurm:
    """The queue, the runs folder, and what was asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock(self._go_on)
        self.runs = folder / "runs"
        self.is_silent = False
        """Whether the controller does not answer."""
        self.on_scancel: Callable[[str], str | None] = lambda arguments: None
        """What scancel does; the words with which it fails, if it does."""
        self.silent_clusters: set[str] = set()
        """Of several, those whose controllers do not answer."""
        self.accounting: list[str] | None = None
        """What sacct tells: "ID STATE [EXIT_CODE [NODES [START]]]"; None: no accounting is kept."""
        self._queues: dict[str, list[str]] = {}
        self._asked: list[tuple[str, str]] = []
        self._play: Iterator[None] = iter(())
        self._looks_before = 0
        commands = SimpleNamespace(
            run=self._run,
            DEVNULL=subprocess.DEVNULL,
            TimeoutExpired=subprocess.TimeoutExpired,
        )
        monkeypatch.setattr(call, "subprocess", commands)
        monkeypatch.setattr(call, "shutil", SimpleNamespace(which=lambda name: name))
        monkeypatch.chdir(folder)
        monkeypatch.setenv("SLUICE_RUNS", str(self.runs))
        monkeypatch.setenv("SLUICE_CLUSTER_INSIDE", "1")
        monkeypatch.delenv("SLUICE_SITE", raising=False)
        monkeypatch.delenv("COLUMNS", raising=False)

    def set_queue(self, *jobs: str, cluster: str = "") -> None:
        """Say what squeue answers: "ID STATE [REASON [NODES [START [LEFT]]]]"; - is nothing.

        The cluster at hand is called "here"; of others squeue has to name them.
        """
        self._queues[cluster] = list(jobs)

    def asked(self, command: str) -> list[str]:
        """Return the arguments of each call of a command."""
        return [arguments for name, arguments in self._asked if name == command]

    def meanwhile(self, play: Callable[[], Iterator[None] | None]) -> None:
        """Have something go on while the command runs, from its first wait on.

        Each `yield` lasts until the command has seen the queue and the files as they are then.
        """
        self._play, self._looks_before = _steps(play), len(self.asked("squeue"))

    @property
    def is_played(self) -> bool:
        """Whether all has happened that was to happen meanwhile."""
        return next(self._play, self) is self

    def _go_on(self) -> None:
        looks = len(self.asked("squeue"))
        if looks > self._looks_before:
            self._looks_before = looks
            next(self._play, None)

    def _run(self, command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        name, *arguments = command
        self._asked.append((name, " ".join(arguments)))
        cluster = ""
        if arguments and arguments[0].startswith("--clusters="):
            cluster = arguments.pop(0).removeprefix("--clusters=")
        output: str = ""
        error: str | None = None
        if name == "squeue" and (self.is_silent or cluster in self.silent_clusters):
            error = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
        elif name == "squeue":
            output = self._squeue(arguments, self._queues.get(cluster, []))
        elif name == "scontrol":
            output = f"ClusterName             = {cluster or 'here'}\n"
        elif name == "sacct" and self.accounting is None:
            error = "Slurm accounting storage is disabled\n"
        elif name == "sacct":
            output = self._sacct(arguments)
        else:
            error = self.on_scancel(" ".join(arguments))
        code = 0 if error is None else 1
        return subprocess.CompletedProcess(command, code, output, error or "")

    def _sacct(self, arguments: Sequence[str]) -> str:
        (wanted,) = (word[7:].split(",") for word in arguments if word.startswith("--jobs="))
        lines = []
        for job in self.accounting or []:
            words = [*job.split(" "), *["-"] * 5][:5]
            job_id, state, code, nodes, start = ("" if w == "-" else w for w in words)
            if job_id in wanted:
                shown = [job_id, state, code or "0:0", nodes or "None assigned", start or "Unknown"]
                lines.append("|".join([*shown, self._folder_of(int(job_id))]) + "\n")
        return "".join(lines)

    def _squeue(self, arguments: Sequence[str], queue: Sequence[str]) -> str:
        (wanted,) = (word[7:].split(",") for word in arguments if word.startswith("--jobs="))
        lines = []
        for job in queue:
            words = [*job.split(" "), *["-"] * 6][:6]
            job_id, state, reason, nodes, start, left = ("" if w == "-" else w for w in words)
            # Of an array or a heterogeneous job the number comes first: 12_1, 12+0.
            number = re.split("[_+]", job_id)[0]
            if number in wanted:
                folder = self._folder_of(int(number))
                shown = [job_id, state, nodes, start or "N/A", left or "1:00:00", reason or "None"]
                lines.append("|".join([*shown, folder]) + "\n")
        return "".join(lines)

    def _folder_of(self, job_id: int) -> str:
        """Return the working directory of a job: that of the newest run with this number."""
        found = []
        for path in self.runs.glob("*/*/jobs.jsonl"):
            for line in path.read_text().splitlines():
                if line.endswith("}") and (record := json.loads(line))["job_id"] == job_id:
                    found.append((record["submitted"], str(path.parent)))
        return max(found)[1] if found else ""

    def run(self, name: str = "tinyllama/20260101-000000-abcdef", *job_ids: int) -> Path:
        """Make a run folder, submitted as these jobs."""
        folder = self.runs / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        (folder / "config.yaml").write_text("model: {a: 1}\nmax_steps: 1000\n")
        for job_id in job_ids:
            submit(folder, job_id)
        return folder


def _steps(play: Callable[[], Iterator[None] | None]) -> Iterator[None]:
    yield from play() or ()


def submit(
    folder: Path, job_id: int, submitted: str = "2026-01-01T00:00:00+0000", cluster: str = ""
) -> None:
    """Record a submission."""
    with (folder / "jobs.jsonl").open("a") as stream:
        record = {"job_id": job_id, "submitted": submitted, "num_nodes": 2, "time": "04:00:00"}
        record |= {"cluster": cluster} if cluster else {}
        stream.write(json.dumps(record) + "\n")


def attempt(folder: Path, number: int, job_id: int, *, start: int = 0, **outcome: Any) -> Path:
    """Make an attempt, and how it ended if that is said."""
    path = folder / f"attempts/{number}"
    path.mkdir(parents=True, exist_ok=True)
    record = {"job_id": job_id, "restart_count": 0, "nodes": ["node1", "node2"], "step": start}
    (path / "slurm.json").write_text(json.dumps(record))
    if outcome:
        (path / "outcome.json").write_text(json.dumps(outcome))
    return path


def log_step(folder: Path, step: int, rate: float = 1000.0) -> None:
    """Append a line to metrics.jsonl: 500 tokens a step."""
    line = {"step": step, "loss": 1.0, "tokens": 500 * step, "tokens_per_second": rate}
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def make_old(folder: Path) -> None:
    """Let everything in a folder be two days old."""
    then = time.time() - 2 * 86400
    for path in folder.rglob("*"):
        os.utime(path, (then, then))
