"""Every check of `make submit`, failed on purpose: one line, exit 2, nothing queued or left."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.cluster.desk import Desk
from tests.image.accounts import IS_ROOT

pytestmark = [
    pytest.mark.needs("slurm"),
    pytest.mark.needs("apptainer"),
    # The first may wait for the image, which another worker builds.
    pytest.mark.timeout(900),
]

SITE = """
[slurm]
partition = "gpu"
cpus_per_node = 4
gpus_per_node = 2
save_s = 20
[paths]
scratch = "/var/tmp"
[container]
variant = "cpu"
"""


@dataclass
class Situation:
    """A desk in which something can be made wrong, and is right again afterwards."""

    desk: Desk
    folder: Path

    def site(self, change: Callable[[str], str]) -> None:
        """Write a site.toml."""
        (self.desk.checkout / "site.toml").write_text(change(SITE))

    def with_environment(self, **variables: str) -> None:
        """Set variables of the user's."""
        self.desk = replace(self.desk, environment=self.desk.environment | variables)

    def queue(self) -> str:
        """Return the queue, as a user sees it."""
        return self.desk.cluster.output("squeue", "--noheader")

    def runs(self) -> list[str]:
        """Return all that lies in the runs folder."""
        return sorted(str(path) for path in (self.desk.checkout / "runs").glob("*/*"))

    def refusal(self, *words: str) -> str:
        """Return the one line that `make submit` refuses with, as a plan and for real."""
        before = self.queue(), self.runs()
        said = []
        for more in (["PLAN=1"], []):
            done = self.desk.make_inside("submit", *words, *more)
            assert done.returncode == 2, done.stdout + done.stderr
            lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
            assert len(lines) == 1, done.stderr
            assert lines[0].startswith("error: ")
            said.append(lines[0])
        assert said[0] == said[1]
        assert (self.queue(), self.runs()) == before
        return said[0]


@pytest.fixture
def situation(desk: Desk, tmp_path: Path) -> Iterator[Situation]:
    yield Situation(desk, tmp_path)
    (desk.checkout / "site.toml").unlink(missing_ok=True)


def test_a_plan_shows_the_job_and_the_command_that_would_queue_it(desk: Desk) -> None:
    before = desk.cluster.output("squeue", "--noheader")
    done = desk.make("submit", "NODES=2", "GPUS=1", "ACCEL=zero2", "PLAN=1", "ARGS=--dry_run")
    assert done.returncode == 0, done.stderr
    assert "2 nodes x (1 GPU, 1 process), 2 CPUs each, at most 04:00:00" in done.stdout
    assert re.search(r"start +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d on node\[1-2\]", done.stdout)
    command = re.search(r"command +(sbatch .*train\.sbatch)", done.stdout)
    assert command
    assert "nothing was queued" in done.stdout
    folder = re.search(r"--chdir=(\S+)", command[1])
    assert folder
    assert not Path(folder[1]).exists()
    assert desk.cluster.output("squeue", "--noheader") == before


def test_a_missing_image(situation: Situation) -> None:
    situation.with_environment(SLUICE_IMAGES=str(situation.folder))
    said = situation.refusal("ARGS=--dry_run")
    assert "there is no" in said
    assert "make build-image VARIANT=cpu" in said


def test_an_image_of_another_lock(situation: Situation, image: Path) -> None:
    other = situation.folder / image.name
    other.symlink_to(image)
    manifest = json.loads(image.with_suffix(".json").read_text())
    other.with_suffix(".json").write_text(json.dumps(manifest | {"lock_sha256": "0" * 64}))
    assert "another lock" in situation.refusal(f"IMAGE={other}", "ARGS=--dry_run")


def test_a_dataset_that_was_not_fetched(situation: Situation) -> None:
    assert "make fetch" in situation.refusal("GPUS=0")


@pytest.mark.parametrize("is_file", [True, False])
def test_a_runs_folder_that_cannot_be_written(situation: Situation, is_file: bool) -> None:
    place = situation.folder / "place"
    if is_file:
        place.write_text("")
    elif IS_ROOT:
        # The one kind of folder that root cannot write either.
        place = Path("/proc/1")
    else:
        place.mkdir(mode=0o500)
    situation.site(lambda text: text.replace("[paths]", f'[paths]\nruns = "{place}/runs"'))
    said = situation.refusal("ARGS=--dry_run")
    assert "site.toml: paths.runs" in said
    assert str(place) in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["GPUS=3"], "GPUS=3: a node has 2"),
        (["GPUS=2", "NPROC=1"], "NPROC=1: a node's processes have one GPU each"),
        (
            ["NODES=1", "GPUS=0", "NPROC=3", "ARGS=--dry_run"],
            "do not divide among 3 processes",
        ),
        (["NODES=3", "ARGS=--dry_run"], "NODES=3: partition gpu has 2"),
        (["TIME=1-00:00:01", "ARGS=--dry_run"], "partition gpu allows at most 1-00:00:00"),
        (["TIME=1:19", "ARGS=--dry_run"], "leaves no time to train"),
        (["JOB=tinylama"], "did you mean 'tinyllama'"),
        (["ACCEL=zero4", "ARGS=--dry_run"], "ACCEL=zero4: there is no"),
        (["ARGS=--dry_run --optimizer.lr_rate 1"], "did you mean 'optimizer.lr'"),
        (["RUN=nothing"], "RUN=nothing: there is no such run"),
        (["RUN=nothing", "NAME=new"], "NAME=new: is for a new run"),
        (["ARGS=--dry_run true"], "write --dry_run without a value"),
    ],
)
def test_what_the_command_line_asks_for_in_vain(
    situation: Situation, words: list[str], expected: str
) -> None:
    assert expected in situation.refusal(*words)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("gpu", "gpus"), "slurm.partition 'gpus': there is no such partition; did you mean 'gpu'"),
        (("gpu", "down"), "slurm.partition 'down': is DOWN"),
        (
            ('"gpu"', '"gpu"\naccount = "closed"'),
            "slurm.account 'closed' is not one of yours: research",
        ),
        (('"gpu"', '"gpu"\nqos = "golden"'), "slurm.qos 'golden' is not one of yours"),
        (("cpus_per_node = 4\n", ""), "site.toml: slurm.cpus_per_node is missing"),
        (("save_s", "safe_s"), "'slurm.safe_s' is not a setting; did you mean 'save_s'"),
        (('"cpu"', '"cpu"\nbinds = ["ro"]'), "container.binds: 'ro' is not SOURCE:TARGET:ro"),
    ],
)
def test_a_site_that_is_not_as_it_says(
    situation: Situation, change: tuple[str, str], expected: str
) -> None:
    situation.site(lambda text: text.replace(*change, 1))
    assert expected in situation.refusal("ARGS=--dry_run")


def test_limits_of_a_partition_and_of_a_qos(situation: Situation) -> None:
    situation.site(lambda text: text.replace('"gpu"', '"short"'))
    assert "partition short allows at most" in situation.refusal("TIME=31", "ARGS=--dry_run")
    said = situation.refusal("TIME=10", "NODES=2", "ARGS=--dry_run")
    assert "partition short gives a job at most 1" in said
    situation.site(lambda text: text.replace('"gpu"', '"gpu"\nqos = "short"'))
    assert "QOS short allows at most 00:10:00" in situation.refusal("TIME=11", "ARGS=--dry_run")


def test_what_one_job_may_have_of_a_qos_chosen_or_not(situation: Situation) -> None:
    def limit(*words: str) -> None:
        situation.desk.cluster.output("sacctmgr", "--immediate", "modify", "qos", *words)

    try:
        # The one that jobs have which name none.
        limit("normal", "set", "MaxTRESPerJob=node=1,gres/gpu=1")
        said = situation.refusal("NODES=2", "ARGS=--dry_run")
        assert "NODES=2: QOS normal allows a job at most 1 nodes" in said
        said = situation.refusal("NODES=1", "GPUS=2", "ARGS=--dry_run")
        assert "GPUS=2: QOS normal allows a job at most 1 GPUs, and this one asks for 2" in said
        limit("normal", "set", "MaxTRESPerJob=node=-1,gres/gpu=-1", "MaxWall=20")
        said = situation.refusal("TIME=21", "ARGS=--dry_run")
        assert "TIME=21: QOS normal allows at most 00:20:00" in said
    finally:
        limit("normal", "set", "MaxTRESPerJob=node=-1,gres/gpu=-1", "MaxWall=-1")
    # A QOS goes before the association; only what none of them says is left to the next.
    who = ("user", "where", "name=root", "account=research")
    if not IS_ROOT:
        who = ("user", "where", "account=research")
    modify = ("sacctmgr", "--immediate", "modify", *who, "set")
    try:
        situation.desk.cluster.output(*modify, "MaxTRESPerJob=node=1", "MaxWall=5")
        situation.site(lambda text: text.replace('"gpu"', '"gpu"\nqos = "short"'))
        said = situation.refusal("NODES=2", "TIME=9", "ARGS=--dry_run")
        assert "NODES=2: account research allows a job at most 1 nodes" in said
    finally:
        situation.desk.cluster.output(*modify, "MaxTRESPerJob=node=-1", "MaxWall=-1")


def test_what_slurm_itself_refuses_leaves_nothing(situation: Situation) -> None:
    flags = 'sbatch_flags = ["--licenses=no-such-license"]'
    situation.site(lambda text: text.replace('"gpu"', f'"gpu"\n{flags}'))
    before = situation.queue(), situation.runs()
    done = situation.desk.make_inside("submit", "ARGS=--dry_run")
    assert done.returncode == 2
    assert "error: sbatch: " in done.stderr
    assert "nothing was queued" in done.stderr
    assert "Traceback" not in done.stderr
    assert (situation.queue(), situation.runs()) == before


def test_a_controller_that_does_not_answer(situation: Situation) -> None:
    conf = situation.folder / "slurm.conf"
    here = situation.desk.cluster.folder / "etc"
    # As the real one, with a controller where nobody listens.
    text = (here / "slurm.conf").read_text()
    conf.write_text(
        re.sub(r"(?m)^(SlurmctldHost=).*", r"\1login(127.0.0.1)\nSlurmctldPort=9", text)
    )
    for name in ("gres.conf", "cgroup.conf"):
        if (here / name).exists():
            shutil.copy(here / name, conf.parent)
    before = situation.runs()
    environment = situation.desk.environment | {"SLURM_CONF": str(conf)}
    for more in (["PLAN=1"], []):
        done = situation.desk.cluster.run(
            *("env", f"SLURM_CONF={conf}", "make", "submit", "ARGS=--dry_run", *more),
            cwd=situation.desk.checkout,
            environment=environment,
            timeout=200,
        )
        assert done.returncode == 2
        said, _ = done.stderr.splitlines()
        assert said.startswith("error: the Slurm controller does not answer")
        assert situation.runs() == before


def test_without_a_cluster_it_says_how_to_get_one(desk: Desk, tmp_path: Path) -> None:
    alone = replace(desk, environment=desk.environment | {"SLUICE_CLUSTER": str(tmp_path / "none")})
    done = alone.make("submit", "ARGS=--dry_run")
    assert done.returncode == 2
    assert "make cluster-up" in done.stderr
    assert "site.toml" in done.stderr
