"""Jobs on a real Slurm of two nodes, in the image: the same curve, whatever happens to them.

A job of two nodes costs half a minute of both cores, so each shows all that it can.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.moments import Pause
from tests.real.desk import SECRET, Desk, paused, processes

pytestmark = [
    pytest.mark.needs("slurm"),
    pytest.mark.needs("apptainer"),
    pytest.mark.computes(2),
]


def test_two_jobs_share_their_nodes_and_one_goes_on_after_its_time_limit(
    desk: Desk, tmp_path: Path
) -> None:
    pause, site = Pause(tmp_path, "after-latest"), desk.site(save_s=170)
    # Its processes wait for the one that is paused as long as the other job takes.
    limited = desk.pausing(pause).submit(
        *("ACCEL=zero1", "NODES=2", "GPUS=0", "TIME=30", "NAME=limited"),
        "ARGS=--dry_run --timeout_s 86400",
        site=site,
    )
    with paused(desk, limited, pause):
        in_its_midst = list(processes())
        other = desk.submit("ACCEL=fsdp2", "NODES=2", "GPUS=0", "ARGS=--dry_run")
        desk.wait(other)
        # It has two to three minutes left from now on, so that Slurm warns it when it next looks;
        # for the next attempt it has half an hour again.
        used = desk.cluster.output(
            "squeue", "--noheader", f"--jobs={limited.job_id}", "--Format=TimeUsed"
        )
        change = ("scontrol", "update", f"JobId={limited.job_id}")
        desk.cluster.output(*change, f"TimeLimit={int(used.split(':')[-2]) + 3}")
        desk.wait_until(lambda: "USR1: the processes are asked" in limited.logs(), limited)
        desk.cluster.output(*change, "TimeLimit=30")
    desk.wait(limited)

    for run, accel in ((other, "fsdp2"), (limited, "zero1")):
        assert run.outcomes()[-1]["outcome"] == "finished", run.logs()
        assert run.slurm()[0]["nodes"] == ["node1", "node2"]
        assert run.curve() == desk.on_one_machine(accel, "--dry_run").curve()
        assert (run.folder / "export/model.safetensors").is_file()
    # They met at ports of their own, and leave nothing on the nodes.
    assert other.slurm()[0]["master"] != limited.slurm()[0]["master"]
    for node in ("node1", "node2"):
        # Not into what other jobs make and delete there meanwhile.
        find = ("find", "/var/tmp", "-ignore_readdir_race", "-name", "sluice-*", "-prune")
        left = desk.cluster.output(*find, "-print", node=node)
        jobs = {path.rpartition("-")[2] for path in left.splitlines()}
        assert not jobs & {other.job_id, limited.job_id}

    # It was asked, saved, and went on under its number.
    stopped, *more = limited.outcomes()
    assert (stopped["outcome"], stopped["next"]) == ("stopped", "requeue"), limited.logs()
    assert limited.slurm()[1]["step"] == stopped["step"] > 0
    assert len(more) == 1
    assert {record["job_id"] for record in limited.slurm()} == {int(limited.job_id)}
    shown = desk.make("status", "FORMAT=json", f"RUN={limited.name}")
    assert shown.returncode == 0, shown.stderr
    (row,) = json.loads(shown.stdout)["runs"]
    assert row["attempts"] == 2

    # No secret of the submitter is on a command line, in a job's environment or in a run folder.
    seen = []
    for _, command, variables in in_its_midst:
        words = b" ".join(command)
        assert SECRET.encode() not in words
        # Outside of the container and in it; another job's processes are as good.
        if any(variable.startswith(b"SLUICE_RUN_FOLDER=") for variable in variables):
            seen.append(words)
            assert SECRET.encode() not in b" ".join(variables), words
    assert any(b"train.tinyllama" in words for words in seen)
    assert any(b"train.sbatch" in words or b"slurm_script" in words for words in seen)
    for path in (*limited.folder.rglob("*"), *other.folder.rglob("*")):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    assert desk.environment["HF_TOKEN"] == SECRET


WAITS = """
import time
from pathlib import Path

while not Path("go").exists():
    time.sleep(0.1)
"""


def test_a_job_waits_for_the_end_of_a_run_and_has_slurm_send_mail(desk: Desk) -> None:
    own = desk.checkout.parent / "waiting"
    own.mkdir()
    (own / "waits.py").write_text(WAITS)
    (own / "first.yaml").write_text("script: waits.py\nresources: {gpus_per_node: 0}\n")
    (own / "second.py").write_text("print('second')\n")
    (own / "second.yaml").write_text(
        "script: second.py\nresources: {gpus_per_node: 0}\nafter: first\nmail: ada@example.edu\n"
    )
    first = desk.submit(f"JOB={own / 'first.yaml'}")
    second = desk.submit(f"JOB={own / 'second.yaml'}")
    shown = desk.cluster.output("scontrol", "show", "job", second.job_id)
    assert f"Dependency=afterok:{first.job_id}" in shown
    assert "MailUser=ada@example.edu" in shown
    assert "MailType=END,FAIL" in shown
    (first.folder / "go").touch()
    assert desk.wait(second).outcomes()[-1]["outcome"] == "finished", second.logs()
    [ended] = first.outcomes()
    assert ended["outcome"] == "finished"
    # There is nothing left to wait for.
    done = desk.make_inside("submit", f"JOB={own / 'second.yaml'}", "PLAN=1", site=desk.site())
    assert done.returncode == 0, done.stderr
    assert "after: first has finished" in done.stdout
    assert "--dependency" not in done.stdout


def test_a_job_without_progress_stops_and_says_why(desk: Desk) -> None:
    site = desk.site(sbatch_flags=("--hold",))
    run = desk.submit("NODES=1", "NAME=broken", "ARGS=--dry_run", site=site)
    # Its code is gone when it starts.
    (run.folder / "code/train/tinyllama.py").unlink()
    desk.cluster.output("scontrol", "release", run.job_id)
    desk.wait(run)
    last = run.outcomes()[-1]
    assert len(run.outcomes()) == 2, run.logs()
    assert (last["outcome"], last["next"]) == ("failed", "stop")
    assert last["why"] == "2 attempts in a row made no progress (step 0)"
    followed = desk.make("logs", f"RUN={run.name}")
    assert followed.returncode == 2, "make says 2 for any failure of a recipe"
    assert "no progress" in followed.stdout


SITE = """
[slurm]
partition = "gpu"
cpus_per_node = 4
gpus_per_node = 2
save_s = 20
sbatch_flags = ["--comment=of-the-site"]
[paths]
scratch = "$SCRATCH_OF_THE_NODE/of/all"
copy_datasets = true
[container]
variant = "cpu"
binds = ["/usr/share/zoneinfo:/zones"]
flags = ["--no-privs"]
modules = ["nearby"]
[network]
interface = "eth0"
[preflight]
all_reduce_floor_mb_per_second = 1
timeout_s = 600
max_clock_skew_s = 600
[environment]
SCRATCH_OF_THE_NODE = "/var/tmp"
NCCL_DEBUG = "WARN"
"""


MODULES = """module() { echo "$MODULE_OF_NOBODY$*" >>"$MODULESHOME/asked"; }
"""


def test_a_site_has_its_own_paths_binds_flags_modules_and_network(
    desk: Desk, tmp_path: Path
) -> None:
    site = tmp_path / "site.toml"
    site.write_text(SITE)
    (tmp_path / "init").mkdir()
    (tmp_path / "init/bash").write_text(MODULES)
    desk = replace(desk, environment=desk.environment | {"MODULESHOME": str(tmp_path)})
    pause = Pause(tmp_path, "in-preflight")
    run = desk.pausing(pause).submit("NODES=2", "GPUS=1", "ARGS=--dry_run", site=site)
    # A TERM while the nodes are looked at is no fault of theirs. To the steps and not to the batch
    # script, as Slurm has it when it preempts a job.
    with paused(desk, run, pause):
        desk.cluster.output("scancel", "--signal=TERM", run.job_id)
    desk.wait(run)
    first, last = run.outcomes()
    assert (first["outcome"], first["next"], first["step"]) == ("stopped", "requeue", 0), run.logs()
    assert last["outcome"] == "finished", run.logs()
    assert run.slurm()[1]["master"].startswith("10.77.0.11:")
    for node in (0, 1):
        said = (run.attempts()[1] / f"node-{node}.log").read_text()
        assert f"node{node + 1}: copied to /var/tmp/of/all/sluice-" in said
        # The job has made it, and others are to find room in it.
        mode = desk.cluster.output("stat", "-c", "%a", "/var/tmp/of/all", node=f"node{node + 1}")
        assert mode == "1777"
    assert (tmp_path / "asked").read_text() == "load nearby\nload nearby\n"
    comment = desk.cluster.output("scontrol", "show", "job", run.job_id, "--oneliner")
    assert "Comment=of-the-site" in comment


def test_nodes_between_which_the_network_is_slow_end_the_job(desk: Desk, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    slow = SITE.replace("per_second = 1", "per_second = 1000000")
    site.write_text(slow.replace('modules = ["nearby"]\n', ""))
    run = desk.wait(desk.submit("NODES=2", "ARGS=--dry_run", site=site))
    # Which of the two it is cannot be told, and there are no others.
    first, last = run.outcomes()
    assert (first["outcome"], first["next"]) == ("unhealthy", "requeue"), run.logs()
    assert (last["outcome"], last["next"]) == ("unhealthy", "stop")
    said = (run.attempts()[0] / "batch.log").read_text()
    assert "preflight: all 2 nodes: all-reduce " in said
    assert "not excluded: node1,node2: without it the job could not run" in said


def test_a_job_does_not_run_in_another_image_than_it_was_queued_with(
    desk: Desk, image: Path, tmp_path: Path
) -> None:
    (tmp_path / image.name).symlink_to(image)
    manifest = tmp_path / image.with_suffix(".json").name
    manifest.write_text(image.with_suffix(".json").read_text())
    site = desk.site(sbatch_flags=("--hold",))
    run = desk.submit("NODES=1", f"IMAGE={tmp_path / image.name}", "ARGS=--dry_run", site=site)
    content = json.loads(manifest.read_text()) | {"sha256": "0" * 64}
    manifest.write_text(json.dumps(content))
    desk.cluster.output("scontrol", "release", run.job_id)
    desk.wait(run)
    assert not (run.folder / "attempts").exists()
    said = (run.folder / f"slurm-{run.job_id}.log").read_text()
    assert "has changed since the job was queued" in said
    assert f"continue in it with make submit RUN={run.name}" in said
