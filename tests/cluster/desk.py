"""A user's checkout at a cluster, and what the user sees of the runs that are submitted from it."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.local import Cluster
from tests.conftest import read_metrics

# A job of a few seconds, with an epoch of the queue's own delays.
JOB_TIMEOUT_S = 240
# Another in each run: this file too is in the code of every job.
SECRET = f"hf_{secrets.token_hex(16)}"


@dataclass(frozen=True)
class Run:
    """A run folder, as the tests look at it."""

    folder: Path

    @property
    def name(self) -> str:
        """What RUN= takes."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def job_id(self) -> str:
        """The newest job."""
        return str(json.loads((self.folder / "jobs.jsonl").read_text().splitlines()[-1])["job_id"])

    def attempts(self) -> list[Path]:
        """The folders of its attempts, the first first."""
        found = (self.folder / "attempts").glob("*")
        return sorted(found, key=lambda path: int(path.name))

    def slurm(self) -> list[dict[str, Any]]:
        """What slurm.json says, for each attempt."""
        return [json.loads((path / "slurm.json").read_text()) for path in self.attempts()]

    def outcomes(self) -> list[dict[str, Any]]:
        """What outcome.json says, for each attempt."""
        return [json.loads((path / "outcome.json").read_text()) for path in self.attempts()]

    def logs(self) -> str:
        """All that its jobs said, for the message of a test that fails."""
        files = sorted(self.folder.glob("attempts/*/*.log")) + sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in files)

    def curve(self) -> list[tuple[Any, ...]]:
        """Step, loss and validation loss of each line of its metrics."""
        lines = read_metrics(self.folder)
        steps = [line["step"] for line in lines]
        assert steps == sorted(set(steps)), "a step was logged twice, or out of order"
        return [(x["step"], x.get("loss"), x.get("validation_loss")) for x in lines]


@dataclass(frozen=True)
class Desk:
    """A checkout from which jobs are submitted to a private cluster."""

    cluster: Cluster
    checkout: Path
    environment: dict[str, str]

    def make(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run make outside of the cluster, as on the machine that holds it."""
        return subprocess.run(
            ["make", "--no-print-directory", *words],
            check=False,
            cwd=self.checkout,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def make_inside(
        self, *words: str, site: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run make on the login node, where a site's own file counts."""
        return self.cluster.run(
            *("make", "--no-print-directory", *words),
            cwd=self.checkout,
            environment=self.environment | ({"SLUICE_SITE": str(site)} if site else {}),
            timeout=200,
        )

    def submit(self, *words: str, site: Path | None = None) -> Run:
        """Submit a job that has to be taken."""
        done = (
            self.make_inside("submit", *words, site=site) if site else self.make("submit", *words)
        )
        assert done.returncode == 0, done.stderr + done.stdout
        found = re.search(r"make logs RUN=(\S+)", done.stdout)
        assert found, done.stdout
        return Run(self.checkout / "runs" / found[1])

    def wait(self, run: Run, timeout: float = JOB_TIMEOUT_S) -> Run:
        """Wait until the run's job is over for good."""
        self.wait_until(lambda: self.is_over(run), run, timeout, every_s=1.0)
        return run

    def is_over(self, run: Run) -> bool:
        """Whether Slurm is done with the run's job."""
        state = self.cluster.state_of(run.job_id)
        return state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")

    def wait_until(
        self,
        happened: Callable[[], bool],
        run: Run,
        timeout: float = JOB_TIMEOUT_S,
        every_s: float = 0.3,
    ) -> None:
        """Wait until `happened`; otherwise fail with what the run's jobs said."""
        deadline = time.monotonic() + timeout
        while not happened():
            if time.monotonic() > deadline:
                queue = self.cluster.output("squeue")
                raise AssertionError(f"not in {timeout} s\n{queue}\n{run.logs()}")
            time.sleep(every_s)

    def on_one_machine(self, accel: str, *arguments: str, nproc: int = 2) -> Run:
        """Run the same with `make run`, on the host, and return its run."""
        words = [f"ACCEL={accel}", f"NPROC={nproc}", "RUNTIME=host", f"ARGS={' '.join(arguments)}"]
        done = self.make("run", *words)
        assert done.returncode == 0, done.stderr + done.stdout
        found = re.search(r"run folder (\S+)", done.stdout)
        assert found, done.stdout
        return Run(self.checkout / found[1])


def environment(cluster: Cluster, apptainer: str, image: Path) -> dict[str, str]:
    """Return the environment of a user at `cluster`, with a secret that no job may see."""
    return cluster.environment | {
        "VENV": sys.prefix,
        "APPTAINER": apptainer,
        "SLUICE_IMAGES": str(image.parent),
        "HF_TOKEN": SECRET,
        "WANDB_API_KEY": SECRET,
        "MY_PASSWORD": SECRET,
    }


def pid_of_rank(rank: int, run: Run) -> int:
    """Return the process of that rank in the newest attempt of a run on the cluster."""
    port = run.slurm()[-1]["master"].rpartition(":")[2]
    wanted = {f"RANK={rank}".encode(), f"MASTER_PORT={port}".encode(), b"SLUICE_STEP=1"}
    (pid,) = (
        pid
        for pid, words, variables in processes()
        if b"train.tinyllama" in words
        and wanted <= set(variables)
        # A job of another cluster may have the same number and port; its run folder is another.
        and run.folder.name in Path(f"/proc/{pid}/mountinfo").read_text()
    )
    return pid


def processes() -> Iterator[tuple[int, list[bytes], list[bytes]]]:
    """Each process on this machine: its number, the words of its command, its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        # One that has ended since.
        with suppress(OSError):
            words, variables = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
            yield int(path.name), words.split(b"\0"), variables.split(b"\0")
