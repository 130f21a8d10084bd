"""Every check of `make submit`, failed on purpose: one line, exit 2, nothing queued or left."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.commands import submit
from cluster.slurm.call import Slurm
from tests.fast import command
from tests.real.accounts import IS_ROOT
from tests.real.desk import Desk
from tests.real.private_slurm import LOCAL

pytestmark = [pytest.mark.needs("slurm"), pytest.mark.needs("apptainer")]


@pytest.fixture(scope="module")
def desk(own_desk: Desk) -> Desk:
    """Return a checkout at a Slurm whose queue and limits nobody else needs."""
    return own_desk


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


MANIFEST = "sluice-cpu.json"
# Without those that are just ending, and without how long each has run.
QUEUE = ("squeue", "--noheader", "--states=PENDING,RUNNING", "-o", "%i")


@dataclass
class Situation:
    """A desk in which something can be made wrong, and is right again afterwards."""

    desk: Desk
    folder: Path
    capfd: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def site(self, change: Callable[[str], str]) -> None:
        """Write a site.toml, and have its Slurm be that of the private cluster's login node."""
        (self.desk.checkout / "site.toml").write_text(change(SITE))
        self.use_slurm()

    def use_slurm(self, *words: str) -> None:
        """Have Slurm's commands run on the login node, behind these words."""
        queue = Slurm(prefix=(str(LOCAL / "exec.sh"), "--", *words))
        self.monkeypatch.setattr(Slurm, "from_site", lambda site: queue)

    def left(self) -> tuple[str, list[str]]:
        """Return the queue, and all that lies in the runs folder."""
        runs = sorted(str(path) for path in (self.desk.checkout / "runs").glob("*/*"))
        return self.desk.cluster.output(*QUEUE), runs

    def image(self, **changes: str) -> Path:
        """Return a file that looks like an image; that nothing is run in it saves a second."""
        manifest = json.loads((Path(self.desk.environment["SLUICE_IMAGES"]) / MANIFEST).read_text())
        content = b"an image"
        manifest |= {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        (self.folder / MANIFEST).write_text(json.dumps(manifest | changes))
        found = (self.folder / MANIFEST).with_suffix(".sif")
        found.write_bytes(content)
        return found

    def refusal(self, *words: str, **variables: str) -> str:
        """Return the one line with which it is refused, as a plan and for real."""
        here = self.desk.environment | {"SLUICE_IMAGES": str(self.image().parent)}
        before = self.left()
        said = set()
        for plan in ("1", "0"):
            done = command.call(
                submit.main,
                *("--plan", plan, *words),
                folder=self.desk.checkout,
                environment=here | variables,
                capfd=self.capfd,
            )
            assert done.returncode == 2, done.stdout + done.stderr
            said.add(done.stderr)
        assert self.left() == before
        return one_line(*said)


def one_line(said: str) -> str:
    """Return the one line of a refusal; what make adds to it aside."""
    (line,) = (line for line in said.splitlines() if not line.startswith("make: ***"))
    assert line.startswith("error: ")
    return line


@pytest.fixture
def situation(
    desk: Desk,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Situation]:
    yield Situation(desk, tmp_path, capfd, monkeypatch)
    (desk.checkout / "site.toml").unlink(missing_ok=True)


# ---- through make ---------------------------------------------------------------------------


def test_a_plan_shows_the_job_and_the_command_that_would_queue_it(desk: Desk) -> None:
    before = desk.cluster.output(*QUEUE)
    done = desk.make("submit", "NODES=2", "GPUS=1", "ACCEL=zero2", "PLAN=1", "ARGS=--dry_run")
    assert done.returncode == 0, done.stderr
    assert "2 nodes x (1 GPU, 1 process), 2 CPUs each, at most 04:00:00" in done.stdout
    assert re.search(r"start +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d on node\[1-2\]", done.stdout)
    # How much that is, and whether it fits: tests/fast/train/test_fit.py.
    assert re.search(r"memory +\d+ MiB of tensors in each process", done.stdout)
    shown = re.search(r"command +(sbatch .*train\.sbatch)", done.stdout)
    assert shown
    assert "nothing was queued" in done.stdout
    folder = re.search(r"--chdir=(\S+)", shown[1])
    assert folder
    assert not Path(folder[1]).exists()
    assert desk.cluster.output(*QUEUE) == before


def test_what_the_script_refuses_in_its_image_is_one_line(situation: Situation) -> None:
    before = situation.left()
    done = situation.desk.make("submit", "NODES=1", "GPUS=0", "NPROC=3", "ARGS=--dry_run")
    assert done.returncode == 2
    assert "do not divide among 3 processes" in one_line(done.stderr)
    assert situation.left() == before


def test_what_slurm_itself_refuses_leaves_nothing(situation: Situation) -> None:
    flags = 'sbatch_flags = ["--licenses=no-such-license"]'
    situation.site(lambda text: text.replace('"gpu"', f'"gpu"\n{flags}'))
    before = situation.left()
    done = situation.desk.make_inside("submit", "ARGS=--dry_run")
    assert done.returncode == 2
    said = one_line(done.stderr)
    assert said.startswith("error: sbatch: ")
    assert "nothing was queued" in said
    assert situation.left() == before


def test_without_a_cluster_it_says_how_to_get_one(situation: Situation, tmp_path: Path) -> None:
    said = situation.refusal("--", "--dry_run", SLUICE_CLUSTER=str(tmp_path / "none"))
    assert "make cluster-up" in said
    assert "site.toml" in said


# ---- the image, the data, the places --------------------------------------------------------


def test_a_missing_image(situation: Situation) -> None:
    said = situation.refusal("--", "--dry_run", SLUICE_IMAGES=str(situation.folder / "none"))
    assert "there is no" in said
    assert "make build-image VARIANT=cpu" in said


def test_an_image_of_another_lock(situation: Situation) -> None:
    other = situation.image(lock_sha256="0" * 64).rename(situation.folder / "other.sif")
    (situation.folder / MANIFEST).rename(situation.folder / "other.json")
    assert "a different lock" in situation.refusal("--image", str(other), "--", "--dry_run")


def test_a_dataset_that_was_not_fetched(situation: Situation) -> None:
    assert "make fetch" in situation.refusal("--gpus", "0")


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
    said = situation.refusal("--", "--dry_run")
    assert "site.toml: paths.runs" in said
    assert str(place) in said


# ---- the command line, the site, limits -----------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gpus 3", "GPUS=3: a node has 2"),
        ("--gpus 2 --nproc 1", "NPROC=1: each process uses one GPU"),
        ("--nodes 3 -- --dry_run", "NODES=3: partition gpu has 2"),
        ("--time 1-00:00:01 -- --dry_run", "partition gpu allows at most 1-00:00:00"),
        ("--time 1:19 -- --dry_run", "leaves no time to train"),
        ("--job tinylama", "did you mean 'tinyllama'"),
        ("--accel zero4 -- --dry_run", "ACCEL=zero4: there is no"),
        ("-- --dry_run --optimizer.lr_rate 1", "did you mean 'optimizer.lr'"),
        ("--run nothing", "RUN=nothing: there is no such run"),
        ("--run nothing --name new", "NAME=new: is for a new run"),
        ("-- --dry_run true", "write --dry_run without a value"),
    ],
)
def test_what_the_command_line_asks_for_in_vain(
    situation: Situation, words: str, expected: str
) -> None:
    assert expected in situation.refusal(*words.split())


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
    assert expected in situation.refusal("--", "--dry_run")


def test_limits_of_a_partition_and_of_a_qos(situation: Situation) -> None:
    situation.site(lambda text: text.replace('"gpu"', '"short"'))
    assert "partition short allows at most" in situation.refusal("--time", "31", "--", "--dry_run")
    said = situation.refusal("--time", "10", "--nodes", "2", "--", "--dry_run")
    assert "partition short allows a job at most 1" in said
    situation.site(lambda text: text.replace('"gpu"', '"gpu"\nqos = "short"'))
    assert "QOS short allows at most 00:10:00" in situation.refusal(
        "--time", "11", "--", "--dry_run"
    )


def test_what_one_job_may_have_of_a_qos_chosen_or_not(situation: Situation) -> None:
    def limit(*words: str) -> None:
        situation.desk.cluster.output("sacctmgr", "--immediate", "modify", "qos", *words)

    try:
        # The one that jobs have which name none.
        limit("normal", "set", "MaxTRESPerJob=node=1,gres/gpu=1")
        said = situation.refusal("--nodes", "2", "--", "--dry_run")
        assert "NODES=2: QOS normal allows a job at most 1 nodes" in said
        said = situation.refusal("--nodes", "1", "--gpus", "2", "--", "--dry_run")
        assert "GPUS=2: QOS normal allows a job at most 1 GPUs, and this job asks for 2" in said
        limit("normal", "set", "MaxTRESPerJob=node=-1,gres/gpu=-1", "MaxWall=20")
        said = situation.refusal("--time", "21", "--", "--dry_run")
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
        said = situation.refusal("--nodes", "2", "--time", "9", "--", "--dry_run")
        assert "NODES=2: account research allows a job at most 1 nodes" in said
    finally:
        situation.desk.cluster.output(*modify, "MaxTRESPerJob=node=-1", "MaxWall=-1")


def test_a_controller_that_does_not_answer(situation: Situation) -> None:
    conf = situation.folder / "slurm.conf"
    here = situation.desk.cluster.folder / "etc"
    # As the real one, with a controller where nobody listens, and little patience.
    text = (here / "slurm.conf").read_text()
    nowhere = r"\1login(127.0.0.1)\nSlurmctldPort=9\nMessageTimeout=2"
    conf.write_text(re.sub(r"(?m)^(SlurmctldHost=).*", nowhere, text))
    for name in ("gres.conf", "cgroup.conf"):
        if (here / name).exists():
            shutil.copy(here / name, conf.parent)
    situation.use_slurm("env", f"SLURM_CONF={conf}")
    said = situation.refusal("--", "--dry_run")
    assert said.startswith("error: the Slurm controller does not answer")
