"""A queue that the tests write by hand: squeue and scancel as scripts, and run folders for them.

The real commands are tried on the private cluster (tests/cluster); here is what no cluster does
when asked, such as being silent, or changing its mind in the middle of a request.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT

SQUEUE = """#!/bin/sh
# At the end, however it ends: whoever waits for the question waits for its answer.
trap 'echo "$*" >>"$FAKE_SLURM/squeue.log"' EXIT
if [ -f "$FAKE_SLURM/silent" ]; then
  echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2
  exit 1
fi
for word in "$@"; do case $word in --jobs=*) wanted=",${word#--jobs=}," ;; esac; done
while IFS= read -r line; do
  case $wanted in *",${line%%|*},"*) ;; *) continue ;; esac
  # The working directory is that of the newest run with this number.
  record=$(grep -H "\\"job_id\\": ${line%%|*}[,}]" "$SLUICE_RUNS"/*/*/jobs.jsonl |
    sed 's/^\\([^:]*\\):.*"submitted": "\\([^"]*\\)".*/\\2 \\1/' |
    sort | tail -n 1 | cut -d ' ' -f 2-)
  printf '%s\\n' "${line%%@*}${record%/jobs.jsonl}${line#*@}"
done <"$FAKE_SLURM/queue"
"""
SCANCEL = """#!/bin/sh
echo "$@" >>"$FAKE_SLURM/scancel.log"
if [ -f "$FAKE_SLURM/on_scancel" ]; then . "$FAKE_SLURM/on_scancel"; fi
"""


class FakeSlurm:
    """The queue, the runs folder, and what was asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "slurm"
        commands = self.folder / "bin"
        commands.mkdir(parents=True)
        scripts = {"squeue": SQUEUE, "scancel": SCANCEL, "sbatch": "#!/bin/sh\n"}
        for name, script in scripts.items():
            (commands / name).write_text(script)
            (commands / name).chmod(0o755)
        self.runs = folder / "runs"
        self.set_queue()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_SLURM", str(self.folder))
        monkeypatch.setenv("SLUICE_RUNS", str(self.runs))
        monkeypatch.setenv("SLUICE_CLUSTER_INSIDE", "1")
        monkeypatch.delenv("SLUICE_SITE", raising=False)
        monkeypatch.delenv("COLUMNS", raising=False)

    def set_queue(self, *jobs: str) -> None:
        """Say what squeue answers: "ID STATE [REASON [NODES [START [LEFT]]]]"; - is nothing."""
        lines = []
        for job in jobs:
            words = [*job.split(" "), *["-"] * 6][:6]
            job_id, state, reason, nodes, start, left = ("" if w == "-" else w for w in words)
            start, reason = start or "N/A", reason or "None"
            lines.append(f"{job_id}|{state}|{nodes}|{start}|{left or '1:00:00'}|@|{reason}\n")
        replace(self.folder / "queue", "".join(lines))

    def set_silent(self, silent: bool) -> None:
        """Let the controller answer, or not."""
        mark = self.folder / "silent"
        mark.touch() if silent else mark.unlink()

    def on_scancel(self, script: str) -> None:
        """Say in sh what scancel does."""
        (self.folder / "on_scancel").write_text(script)

    def asked(self, command: str) -> list[str]:
        """Return the arguments of each call of a command."""
        log = self.folder / f"{command}.log"
        return log.read_text().splitlines() if log.exists() else []

    def until_seen(self) -> None:
        """Wait until the command has seen the queue and the files as they are now."""
        before = len(self.asked("squeue"))
        give_up = time.monotonic() + 30
        # The next call may have begun; the one after it sees all; by the third that is shown.
        while len(self.asked("squeue")) < before + 3:
            assert time.monotonic() < give_up, "nobody asks any more"
            time.sleep(0.01)

    def until_cancelled(self) -> None:
        """Wait until scancel was called."""
        give_up = time.monotonic() + 30
        while not self.asked("scancel"):
            assert time.monotonic() < give_up, "nobody cancels"
            time.sleep(0.01)

    def run(self, name: str = "tinyllama/20260101-000000-abcdef", *job_ids: int) -> Path:
        """Make a run folder, submitted as these jobs."""
        folder = self.runs / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        (folder / "config.yaml").write_text("model: {a: 1}\nmax_steps: 1000\n")
        for job_id in job_ids:
            submit(folder, job_id)
        return folder


def start(command: str, name: str) -> subprocess.Popen[bytes]:
    """Start `make logs` or `make cancel` of a run, in a session that can be interrupted."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.jobs", command, "--run", name],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        bufsize=0,
    )


def submit(folder: Path, job_id: int, submitted: str = "2026-01-01T00:00:00+0000") -> None:
    """Record a submission."""
    with (folder / "jobs.jsonl").open("a") as stream:
        record = {"job_id": job_id, "submitted": submitted, "num_nodes": 2, "time": "04:00:00"}
        stream.write(json.dumps(record) + "\n")


def attempt(folder: Path, number: int, job_id: int, *, start: int = 0, **outcome: Any) -> Path:
    """Make an attempt, and how it ended if that is said."""
    path = folder / f"attempts/{number}"
    path.mkdir(parents=True, exist_ok=True)
    record = {"job_id": job_id, "restart_count": 0, "nodes": ["node1", "node2"], "step": start}
    replace(path / "slurm.json", json.dumps(record))
    if outcome:
        replace(path / "outcome.json", json.dumps(outcome))
    return path


def log_step(folder: Path, step: int, rate: float = 1000.0) -> None:
    """Append a line to metrics.jsonl: 500 tokens a step."""
    line = {"step": step, "loss": 1.0, "tokens": 500 * step, "tokens_per_second": rate}
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def replace(path: Path, content: str) -> None:
    """Write a file whole."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(content)
    unfinished.rename(path)


def make_old(folder: Path) -> None:
    """Let everything in a folder be two days old."""
    then = time.time() - 2 * 86400
    for path in folder.rglob("*"):
        os.utime(path, (then, then))
