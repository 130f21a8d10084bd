"""A user's checkout at a cluster, and what the user sees of the runs that are submitted from it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tests import ranks, waiting
from tests.conftest import read_metrics
from tests.moments import Pause, is_stopped
from tests.real.private_slurm import Cluster
from tests.shared import CHECKOUT
from tests.waiting import wait_until

# The private cluster as a site of its own, which a test completes.
SITE = """
[slurm]
partition = "gpu"
cpus_per_node = 4
gpus_per_node = 2
save_s = {save_s}
sbatch_flags = {sbatch_flags}
[paths]
scratch = "/var/tmp"
[container]
variant = "cpu"
[preflight]
min_free_memory_mb = 256
min_free_scratch_mb = 64
# All nodes share this machine, which may be busy.
timeout_s = 600
max_clock_skew_s = 600
[environment]
NCCL_DEBUG = "WARN"
"""

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

    def make(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run make outside of the cluster, as on the machine that holds it."""
        return waiting.finish(self.start(*words))

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start make so."""
        make = ["make", "--no-print-directory", *words]
        return waiting.start(make, cwd=self.checkout, env=self.environment)

    def site(self, *, save_s: int = 20, sbatch_flags: tuple[str, ...] = ()) -> Path:
        """Write a site.toml for the cluster, with these settings."""
        text = SITE.format(save_s=save_s, sbatch_flags=json.dumps(sbatch_flags))
        path = self.checkout.parent / f"{hashlib.sha256(text.encode()).hexdigest()[:8]}.toml"
        path.write_text(text)
        return path

    def pausing(self, pause: Pause) -> Desk:
        """Return a desk whose jobs stop at a moment."""
        return replace(self, environment=self.environment | pause.variable)

    def make_inside(
        self, *words: str, site: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run make on the login node, where a site's own file counts."""
        return self.cluster.run(
            *("make", "--no-print-directory", *words),
            cwd=self.checkout,
            environment=self.environment | ({"SLUICE_SITE": str(site)} if site else {}),
        )

    def submit(self, *words: str, site: Path | None = None) -> Run:
        """Submit a job that has to be taken, on the login node, with the patience of SITE."""
        done = self.make_inside("submit", *words, site=site or self.site())
        assert done.returncode == 0, done.stderr + done.stdout
        found = re.search(r"make logs RUN=(\S+)", done.stdout)
        assert found, done.stdout
        return Run(self.checkout / "runs" / found[1])

    def wait(self, run: Run) -> Run:
        """Wait until the run's job is over for good."""
        self.wait_until(lambda: self.is_over(run), run, every_s=1.0)
        return run

    def is_over(self, run: Run) -> bool:
        """Whether Slurm is done with the run's job."""
        state = self.cluster.state_of(run.job_id)
        return state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")

    def wait_until_requeued(self, run: Run) -> None:
        """Wait until Slurm has missed a node (SlurmdTimeout) and ended what is left (KillWait)."""
        self.wait_until(lambda: self.cluster.state_of(run.job_id) == "PENDING", run, every_s=1.0)

    def wait_until(self, happened: Callable[[], bool], run: Run, every_s: float = 0.3) -> None:
        """Wait until `happened`; otherwise fail with what the run's jobs said."""
        wait_until(
            happened,
            f"what is waited for of {run.name}",
            every_s=every_s,
            so_far=lambda: f"{self.cluster.queue()}\n{run.logs()}",
        )

    def on_one_machine(self, accel: str, *arguments: str, job: str = "tinyllama") -> Run:
        """Train the same with two processes on this machine, and return the run."""
        folder = Path(tempfile.mkdtemp(dir=self.checkout.parent, prefix=f"{job}-{accel}-"))
        config = Path(f"configs/jobs/{job}.yaml")
        script = Path(yaml.safe_load((CHECKOUT / config).read_text())["script"])
        done = ranks.run(
            *(accel, 2, ".".join(script.with_suffix("").parts), f"--config={config}", *arguments),
            f"--run_folder={folder}",
            environment=self.environment | {"SLUICE_DATASETS": str(self.checkout / "datasets")},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(folder)


@contextmanager
def paused(desk: Desk, run: Run, pause: Pause) -> Iterator[None]:
    """Wait until a process of a job stands at a moment, and let it go on after the block.

    The others wait for it at their next collective. The next attempt stops there, too, if the file
    is gone by then.
    """
    desk.wait_until(pause.path.exists, run)
    standing: list[int] = []

    def stands() -> bool:
        # The number in the file is that of the node's own namespace.
        standing[:] = [pid for pid in pids_of(run) if is_stopped(pid)]
        return bool(standing)

    desk.wait_until(stands, run)
    try:
        yield
    finally:
        for pid in standing:
            # It may have been killed, with its node.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def assert_they_went_on(outcomes: list[dict[str, Any]], run: Run) -> None:
    """Check attempts that only a node which has just come back explains, one for each reason.

    Slurm may start the job there before the node is quite ready. And what it could not tell the
    node before, to end the job, it tells it now: the new attempt is sent TERM, and after KillWait
    KILL. It has saved by then or not, and goes on.
    """
    assert len(outcomes) <= 2, run.logs()
    assert [outcome["next"] for outcome in outcomes] == ["requeue"] * len(outcomes), run.logs()


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


def pids_of(run: Run, *, name: str | None = None) -> list[int]:
    """Return the processes in a run's image, or those called `name`, in its newest attempt."""
    attempt = f"SLUICE_ATTEMPT={len(run.attempts())}".encode()
    wanted = {attempt, b"SLUICE_STEP=1"}
    found = []
    for pid, _, variables in processes():
        # A job of another run may have the same number; the folder that it sees is another.
        with suppress(OSError):
            own = Path(f"/proc/{pid}/comm").read_text().strip()
            if (
                wanted <= set(variables)
                and name in (None, own)
                and run.folder.name in Path(f"/proc/{pid}/mountinfo").read_text()
            ):
                found.append(pid)
    return found


def processes() -> Iterator[tuple[int, list[bytes], list[bytes]]]:
    """Each process on this machine: its number, the words of its command, its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        # One that has ended since.
        with suppress(OSError):
            words, variables = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
            yield int(path.name), words.split(b"\0"), variables.split(b"\0")
