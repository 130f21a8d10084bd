"""What sites do to jobs: plugins that speak, several clusters, short memories, no requeues.

One private Slurm with all of it. Jobs train nothing here: they end before.
"""

from __future__ import annotations

import getpass
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import __main__
from cluster.commands import submit
from cluster.slurm.call import Slurm
from tests.checkout import lay_out
from tests.fast import command
from tests.real.desk import SITE
from tests.real.private_slurm import LOCAL, Cluster, Result, start_cluster
from tests.waiting import wait_until

pytestmark = pytest.mark.needs("slurm")

PLUGIN = """
function slurm_job_submit(job, partitions, user)
  slurm.log_user("Welcome: the beta goes on.")
  if job.comment == "refuse" then
    slurm.log_user("You must name your project.")
    return slurm.ERROR
  end
  if job.comment == "no-requeue" then job.requeue = 0 end
  return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, user) return slurm.SUCCESS end
"""
# Its port is one of the private network of the cluster, which no other run can see.
OTHER = r"""
mkdir -p "$1/other/etc" "$1/other/save"
sed -e "s/^ClusterName=.*/ClusterName=other/" \
  -e "s#^StateSaveLocation=.*#StateSaveLocation=$1/other/save#" \
  -e "s#slurmctld\.\(pid\|log\)#other.\1#" -e "s/^NodeName=[^ ]*/NodeName=far1/" \
  "$1/etc/slurm.conf" >"$1/other/etc/slurm.conf"
sed -i -e '/NodeAddr/s/NodeAddr=[^ ]*/NodeAddr=127.0.0.1 Port=9/' -e '/^JobSubmitPlugins/d' \
  "$1/other/etc/slurm.conf"
echo SlurmctldPort=6917 >>"$1/other/etc/slurm.conf"
echo 'NodeName=far1 Name=gpu File=/dev/null,/dev/zero' >"$1/other/etc/gres.conf"
cp "$1/etc/cgroup.conf" "$1/other/etc"
sacctmgr -i add cluster other
sacctmgr -i add account research cluster=other
sacctmgr -i add user "$2" account=research cluster=other defaultaccount=research qos=normal
SLURM_CONF=$1/other/etc/slurm.conf slurmctld
"""


@dataclass
class Desk:
    """A checkout at that Slurm, whose commands run here, without an image."""

    cluster: Cluster
    checkout: Path
    capfd: pytest.CaptureFixture[str]

    def call(
        self,
        module: object,
        *words: str,
        flags: str = "[]",
        environment: str = "",
        **variables: str,
    ) -> Result:
        # What a site sets for the training processes comes last.
        site = SITE.format(save_s=20, sbatch_flags=flags) + environment
        (self.checkout / "site.toml").write_text(site)
        here = self.cluster.environment | {"VENV": sys.prefix} | variables
        main = module.main  # type: ignore[attr-defined]
        return command.call(main, *words, folder=self.checkout, environment=here, capfd=self.capfd)

    def submit(self, *words: str, **settings: str) -> Result:
        own = ("--runtime=host", "--nodes=1", "--gpus=0", *words, "--", "--dry_run")
        return self.call(submit, *own, **settings)

    def run(self, done: Result) -> tuple[Path, str]:
        """Return the folder of a run that was submitted, and its job."""
        assert done.returncode == 0, done.stderr
        found = re.search(r"run folder (\S+) .* job (\d+)", done.stdout)
        assert found, done.stdout
        return self.checkout / found[1], found[2]

    def state(self, job: str, *options: str) -> str:
        """Return the state of a job as the controller has it; empty when it has forgotten it."""
        asked = (*options, "--noheader", "--states=all", f"--jobs={job},{job}", "-o", "%T")
        return self.cluster.run("squeue", *asked).stdout.strip()

    def wait_for(self, job: str, *states: str) -> None:
        """Wait until a job is in one of `states`, or forgotten, which it is seconds later."""
        is_there = (*states, "")
        wait_until(lambda: self.state(job) in is_there, f"job {job}", so_far=self.cluster.queue)

    def row(self, folder: Path) -> dict[str, object]:
        """Return what make status says of a run."""
        done = self.call(__main__, "status", f"--run={folder}", "--format=json")
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(done.stdout)["runs"]
        assert isinstance(row, dict)
        return row


@pytest.fixture(scope="module")
def cluster(short_folder: Path, users: tuple[str, ...]) -> Iterator[Cluster]:
    made = start_cluster(short_folder / "site", users, "--nodes", "1", "--ssh-port", "0")
    etc = made.folder / "etc"
    (etc / "job_submit.lua").write_text(PLUGIN)
    with (etc / "slurm.conf").open("a") as conf:
        conf.write("JobSubmitPlugins=lua\nMinJobAge=5\n")
    text = (etc / "slurm.conf").read_text()
    (etc / "slurm.conf").write_text(re.sub(r"(?m)^MinJobAge=600\n", "", text))
    made.output("bash", "-ec", OTHER, "bash", made.folder, getpass.getuser())
    made.output("scontrol", "reconfigure")
    yield made
    done = made.local("down.sh")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def checkout(short_folder: Path) -> Path:
    # To Slurm, a pattern in the names of its logs.
    return lay_out(short_folder / "sluice-%j")


@pytest.fixture
def desk(
    cluster: Cluster,
    checkout: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Desk:
    monkeypatch.setattr(Slurm, "from_site", lambda _: Slurm(prefix=(str(LOCAL / "exec.sh"), "--")))
    return Desk(cluster, checkout, capfd)


def test_what_a_plugin_says_reaches_the_user_by_every_command_alike(desk: Desk) -> None:
    flags = '["--comment=refuse"]'
    plan, refused = desk.submit("--plan=1", flags=flags), desk.submit(flags=flags)
    expected = "error: sbatch: Welcome: the beta goes on.; You must name your project.; "
    for done in (plan, refused):
        assert done.returncode == 2
        assert done.stderr.startswith(expected)
        assert done.stderr == plan.stderr
    words = ("check", "--job=tinyllama", "--nodes=1", "--gpus=0", "--format=json")
    answer = desk.call(__main__, *words, flags=flags)
    assert answer.returncode == 2, answer.stderr
    (finding,) = json.loads(answer.stdout)["findings"]
    assert "You must name your project." in finding["message"]
    # Who is taken is greeted, too.
    taken = desk.submit(flags='["--hold"]')
    assert "sbatch says: Welcome: the beta goes on.\n" in taken.stdout
    assert "Welcome: the beta goes on.\n" in desk.submit("--plan=1").stdout
    _, job = desk.run(taken)
    desk.cluster.output("scancel", job)


def test_a_run_stays_with_the_cluster_that_took_it(desk: Desk) -> None:
    done = desk.submit(SLURM_CLUSTERS="other")
    folder, job = desk.run(done)
    (record,) = map(json.loads, (folder / "jobs.jsonl").read_text().splitlines())
    assert record["cluster"] == "other"
    # Whatever module is loaded by now.
    row = desk.row(folder)
    assert (row["state"], row["slurm_state"], row["cluster"]) == ("waiting", "PENDING", "other")
    overview = desk.call(__main__, "check", "--format=json", SLURM_CLUSTERS="other")
    assert json.loads(overview.stdout)["cluster"] == "other"
    ended = desk.call(__main__, "cancel", f"--run={folder}")
    assert ended.returncode == 0, ended.stderr
    assert desk.row(folder)["state"] == "cancelled"
    assert desk.state(job, "--clusters=other") in ("CANCELLED", "")


def test_a_job_that_cannot_open_its_log_says_so_also_when_slurm_has_forgotten_it(
    desk: Desk,
) -> None:
    folder, job = desk.run(desk.submit(flags='["--hold"]'))
    # As on a node that has the folder under another path.
    away = folder.rename(folder.with_name("away"))
    desk.cluster.output("scontrol", "release", job)
    desk.wait_for(job, "FAILED")
    away.rename(folder)

    now = desk.row(folder)
    desk.wait_for(job)
    later = desk.row(folder)
    for row in (now, later):
        assert row["state"] == "failed"
        assert "JobLaunchFailure" in str(row["note"])
        assert f"{folder}/slurm-{job}.log" in str(row["note"])


def test_a_step_that_slurm_refuses_is_no_nodes_fault_and_without_requeues_the_job_ends(
    desk: Desk,
) -> None:
    # srun reads it as --gres: more than the job has.
    environment, flags = 'SLURM_GRES = "gpu:7"', '["--comment=no-requeue"]'
    folder, job = desk.run(desk.submit(flags=flags, environment=environment))
    desk.wait_for(job, "FAILED")
    first = folder / "attempts/1"
    outcome = json.loads((first / "outcome.json").read_text())
    assert outcome["outcome"] == "failed"
    assert "Slurm did not start its processes: Invalid generic resource" in outcome["reason"]
    assert not (first / "preflight/verdict.json").exists()
    # Slurm would not queue it again, and that is said at the beginning, too.
    assert (outcome["next"], "Requeue=0" in outcome["why"]) == ("stop", True)
    assert "Requeue=0" in (first / "batch.log").read_text().splitlines()[1]
    assert json.loads((first / "slurm.json").read_text())["requeues"] is False
    row = desk.row(folder)
    assert (row["state"], row["attempts"]) == ("failed", 1)
