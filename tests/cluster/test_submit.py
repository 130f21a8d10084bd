"""Jobs on a real Slurm of two nodes, in the image: the same curve, whatever happens to them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.desk import SECRET, Desk, Run, pid_of_rank, processes
from tests.cluster.local import wait_until

pytestmark = [
    pytest.mark.needs("slurm"),
    pytest.mark.needs("apptainer"),
    pytest.mark.timeout(900),
    pytest.mark.slow,
    pytest.mark.distributed,
]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
LONG = "--dry_run --max_steps 400 --evaluation.every_steps 100 --log_every_steps 50 --export false"


Process = tuple[int, list[bytes], list[bytes]]


@pytest.fixture(scope="module")
def in_its_midst() -> list[Process]:
    """The machine's processes while a job trains on both nodes (`limited` fills it)."""
    return []


@pytest.fixture(scope="module")
def limited(desk: Desk, in_its_midst: list[Process]) -> Run:
    """A job that is not done when its time limit nears: on a fast machine, too, as it pauses.

    First, because it takes longest; it goes on while other tests run.
    """
    arguments = f"{LONG} --checkpoint.every_steps 10"
    run = desk.submit("NODES=2", "TIME=2", "NAME=limited", f"ARGS={arguments}")
    desk.wait_until((run.folder / "checkpoints/step-00000010").exists, run)
    paused = [pid_of_rank(rank, run) for rank in (0, 1)]
    for pid in paused:
        os.kill(pid, signal.SIGSTOP)
    in_its_midst += processes()

    def go_on() -> None:
        while "USR1: the processes are asked" not in run.logs():
            time.sleep(0.2)
        for pid in paused:
            os.kill(pid, signal.SIGCONT)

    threading.Thread(target=go_on, daemon=True).start()
    return run


@pytest.fixture(scope="module")
def broken(desk: Desk) -> Run:
    """A job whose code is gone when it starts."""
    run = desk.submit("NODES=1", "NAME=broken", "ARGS=--dry_run")
    (run.folder / "code/train/tinyllama.py").unlink()
    return run


@pytest.fixture(scope="module")
def on_two_nodes(desk: Desk, limited: Run, broken: Run) -> dict[str, Run]:
    """A job for each strategy, all queued at once, so that they share the nodes."""
    runs = {}
    for accel in STRATEGIES:
        runs[accel] = desk.submit(f"ACCEL={accel}", "NODES=2", "GPUS=0", "ARGS=--dry_run")
    return runs


@pytest.mark.parametrize("accel", STRATEGIES)
def test_two_nodes_have_the_curve_of_two_processes_on_one_machine(
    desk: Desk, on_two_nodes: dict[str, Run], accel: str
) -> None:
    expected = desk.on_one_machine(accel, "--dry_run").curve()
    run = desk.wait(on_two_nodes[accel])
    assert [outcome["outcome"] for outcome in run.outcomes()] == ["finished"], run.logs()
    assert run.slurm()[0]["nodes"] == ["node1", "node2"]
    assert run.curve() == expected
    assert (run.folder / "export/model.safetensors").is_file()


def test_jobs_that_share_nodes_meet_at_ports_of_their_own(
    desk: Desk, on_two_nodes: dict[str, Run]
) -> None:
    records = [desk.wait(run).slurm()[0] for run in on_two_nodes.values()]
    assert len({record["master"] for record in records}) == len(STRATEGIES)
    began = desk.cluster.output(
        *("sacct", "--noheader", "--parsable2", "--allocations", "--format=start,end"),
        "--jobs=" + ",".join(str(record["job_id"]) for record in records),
    )
    times = sorted(line.split("|") for line in began.splitlines())
    assert any(after[0] < before[1] for before, after in itertools.pairwise(times)), (
        f"no two of them ran at once: {times}"
    )
    for node in ("node1", "node2"):
        left = desk.cluster.output("find", "/var/tmp", "-name", "sluice-*", node=node)
        assert str(records[0]["job_id"]) not in left


def test_no_secret_of_the_submitter_is_in_a_run_folder(
    desk: Desk, on_two_nodes: dict[str, Run]
) -> None:
    run = desk.wait(on_two_nodes["ddp"])
    for path in run.folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    assert desk.environment["HF_TOKEN"] == SECRET


def test_a_job_sees_no_secret_and_shows_none(limited: Run, in_its_midst: list[Process]) -> None:
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


def test_a_job_goes_on_after_its_time_limit_until_it_is_done(desk: Desk, limited: Run) -> None:
    expected = desk.on_one_machine("ddp", *LONG.split()).curve()
    run = desk.wait(limited, timeout=400)
    outcomes = run.outcomes()
    assert len(outcomes) > 1, run.logs()
    assert outcomes[0]["step"] >= 10
    assert [outcome["outcome"] for outcome in outcomes[:-1]] == ["stopped"] * (len(outcomes) - 1)
    assert [outcome["next"] for outcome in outcomes[:-1]] == ["requeue"] * (len(outcomes) - 1)
    assert outcomes[-1]["outcome"] == "finished"
    assert {record["job_id"] for record in run.slurm()} == {int(run.job_id)}
    assert run.curve() == expected
    shown = desk.make("status", "FORMAT=json", f"RUN={run.name}")
    assert shown.returncode == 0, shown.stderr
    (row,) = json.loads(shown.stdout)["runs"]
    assert row["attempts"] == len(outcomes)


def test_a_job_without_progress_stops_and_says_why(desk: Desk, broken: Run) -> None:
    run = desk.wait(broken)
    last = run.outcomes()[-1]
    assert len(run.outcomes()) == 2, run.logs()
    assert (last["outcome"], last["next"]) == ("failed", "stop")
    assert last["why"] == "2 attempts in a row made no progress (step 0)"
    followed = desk.make("logs", f"RUN={run.name}")
    assert followed.returncode == 2, "make says 2 for any failure of a recipe"
    assert "no progress" in followed.stdout


def test_cancel_saves_and_the_run_goes_on_with_other_nodes_and_strategy(desk: Desk) -> None:
    arguments = "--dry_run --max_steps 300 --evaluation.every_steps 100 --log_every_steps 50"
    expected = desk.on_one_machine("ddp", *arguments.split()).curve()
    # With GPUs, which the step that asks to save must not wait for.
    run = desk.submit("NODES=2", "GPUS=1", "NAME=moved", f"ARGS={arguments}")
    desk.wait_until((run.folder / "metrics.jsonl").exists, run)
    again = desk.make("submit", f"RUN={run.name}")
    assert again.returncode == 2
    assert "its job" in again.stderr
    cancelled = desk.make("cancel", f"RUN={run.name}")
    assert cancelled.returncode == 0, cancelled.stderr
    assert "make submit RUN=" in cancelled.stdout
    desk.wait(run)
    stopped = run.outcomes()[-1]
    assert (stopped["outcome"], stopped["next"]) == ("cancelled", "stop"), run.logs()
    assert (run.folder / f"checkpoints/step-{stopped['step']:08}").is_dir()
    assert desk.cluster.state_of(run.job_id) == "CANCELLED"
    done = desk.make("submit", f"RUN={run.name}", "NODES=1", "GPUS=0", "ACCEL=zero2", "NPROC=2")
    assert done.returncode == 0, done.stderr
    desk.wait(run)
    assert run.outcomes()[-1]["outcome"] == "finished", run.logs()
    assert run.slurm()[-1]["step"] == stopped["step"]
    assert len(run.slurm()[-1]["nodes"]) == 1
    curve = run.curve()
    assert [line[0] for line in curve] == [line[0] for line in expected]
    for found, wanted in zip(curve, expected, strict=True):
        numbers = [(a, b) for a, b in zip(found, wanted, strict=True) if b is not None]
        assert all(a == pytest.approx(b, rel=1e-5) for a, b in numbers), (found, wanted)


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
    run = desk.wait(desk.submit("NODES=2", "GPUS=1", "ARGS=--dry_run", site=site))
    assert run.outcomes()[-1]["outcome"] == "finished", run.logs()
    assert run.slurm()[0]["master"].startswith("10.77.0.11:")
    for node in (0, 1):
        said = (run.attempts()[0] / f"node-{node}.log").read_text()
        assert f"node{node + 1}: copied to /var/tmp/of/all/sluice-" in said
        # The job has made it, and others are to find room in it.
        mode = desk.cluster.output("stat", "-c", "%a", "/var/tmp/of/all", node=f"node{node + 1}")
        assert mode == "1777"
    assert (tmp_path / "asked").read_text() == "load nearby\n"
    comment = desk.cluster.output("scontrol", "show", "job", run.job_id, "--oneliner")
    assert "Comment=of-the-site" in comment
    slow = SITE.replace("per_second = 1", "per_second = 1000000")
    site.write_text(slow.replace('modules = ["nearby"]\n', ""))
    run = desk.wait(desk.submit("NODES=2", "ARGS=--dry_run", site=site))
    # Which of the two it is cannot be told, and there are no others.
    first, last = run.outcomes()
    assert (first["outcome"], first["next"]) == ("unhealthy", "requeue"), run.logs()
    assert (last["outcome"], last["next"]) == ("unhealthy", "stop")
    said = (run.attempts()[0] / "batch.log").read_text()
    assert "preflight: all 2 nodes: all-reduce " in said
    assert "not left out: node1,node2: without it the job could not run" in said


def test_a_term_while_the_nodes_are_looked_at_is_no_fault_of_theirs(desk: Desk) -> None:
    run = desk.submit("NODES=2", "ARGS=--dry_run")
    wait_until((run.folder / "attempts/1/preflight/node-0.json").exists, 60, "the preflight")
    # To the steps and not to the batch script, as Slurm has it when it preempts a job.
    desk.cluster.output("scancel", "--signal=TERM", run.job_id)
    desk.wait(run)
    first, last = run.outcomes()
    assert (first["outcome"], first["next"], first["step"]) == ("stopped", "requeue", 0), run.logs()
    assert last["outcome"] == "finished"


def test_a_job_does_not_run_in_another_image_than_it_was_queued_with(
    desk: Desk, image: Path, tmp_path: Path
) -> None:
    (tmp_path / image.name).symlink_to(image)
    manifest = tmp_path / image.with_suffix(".json").name
    manifest.write_text(image.with_suffix(".json").read_text())
    site = tmp_path / "site.toml"
    flag = "--begin=now+10"
    text = SITE.replace("--comment=of-the-site", flag)
    site.write_text(text.replace('modules = ["nearby"]\n', ""))
    run = desk.submit("NODES=1", f"IMAGE={tmp_path / image.name}", "ARGS=--dry_run", site=site)
    content = json.loads(manifest.read_text()) | {"sha256": "0" * 64}
    manifest.write_text(json.dumps(content))
    desk.wait(run)
    assert not (run.folder / "attempts").exists()
    said = (run.folder / f"slurm-{run.job_id}.log").read_text()
    assert "is another one than when the job was queued" in said
    assert f"go on in it with make submit RUN={run.name}" in said
