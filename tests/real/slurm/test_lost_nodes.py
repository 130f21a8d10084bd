"""Jobs that lose what they run on, for a while or for good: preempted, crashed, without power."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.moments import Pause
from tests.real.desk import Desk, Run, paused, pids_of, processes
from tests.shared import CHECKOUT

pytestmark = [
    pytest.mark.needs("slurm"),
    pytest.mark.needs("apptainer"),
    pytest.mark.computes(2),
]


@pytest.fixture(scope="module")
def desk(own_desk: Desk) -> Desk:
    """Return a checkout at a Slurm whose plugs nobody else needs."""
    return own_desk


def test_preemption_saves_and_gives_way(desk: Desk, tmp_path: Path) -> None:
    # A busy machine may take longer to save than the 20 s of slurm/local/login.sh.
    patient = ["sacctmgr", "--immediate", "modify", "qos", "normal", "set", "GraceTime=120"]
    desk.cluster.output(*patient)
    pause, site = Pause(tmp_path, "after-step", 7), desk.site(save_s=120)
    run = desk.pausing(pause).submit("ACCEL=zero2", "NODES=2", "ARGS=--dry_run", site=site)
    with paused(desk, run, pause):
        words = ["sbatch", "--parsable", "--qos=urgent", "--nodes=2", "--exclusive", "--time=1"]
        urgent = desk.cluster.output(*words, "--output=/dev/null", "--wrap=true")
        # Slurm itself tells the processes, and lets those go on that stand still.
        desk.wait_until(lambda: "CANCELLED" in run.logs(), run)
    desk.cluster.wait_for(urgent, "COMPLETED")
    desk.wait(run)
    first, second, *again = run.outcomes()
    assert (first["outcome"], second["outcome"]) == ("stopped", "finished"), run.logs()
    assert first["step"] > 0
    # Slurm 24.11 queues it once more when it ends; there is nothing left to do.
    assert [outcome["outcome"] for outcome in again] == ["finished"] * len(again)
    assert run.slurm()[1]["step"] == first["step"]
    assert run.curve() == desk.on_one_machine("zero2", "--dry_run").curve()


def test_a_bad_node_is_named_and_left_out_where_there_are_others(desk: Desk) -> None:
    with desk.cluster.full("node1", "/var/tmp"):
        run = desk.wait(desk.submit("NODES=1", "ARGS=--dry_run --max_steps 2"))
        # All nodes that there are: to leave one out would be to wait for ever.
        needs_both = desk.submit("NODES=2", "ARGS=--dry_run --max_steps 2")
        log = needs_both.folder / "attempts/1/batch.log"
        desk.wait_until(lambda: log.exists() and "not excluded" in log.read_text(), needs_both)
    desk.wait(needs_both)
    assert "not excluded: node1: without it the job could not run" in log.read_text()
    assert [each["outcome"] for each in needs_both.outcomes()] == ["unhealthy", "finished"]
    first, last = run.outcomes()
    assert (first["outcome"], last["outcome"]) == ("unhealthy", "finished"), run.logs()
    assert [record["nodes"] for record in run.slurm()] == [["node1"], ["node2"]]
    said = (run.attempts()[0] / "batch.log").read_text()
    assert "preflight: node1: scratch" in said
    assert "excluded from now on: node1" in said


def test_a_crash_and_a_loss_of_power_cost_the_steps_since_the_last_checkpoint(
    desk: Desk, tmp_path: Path
) -> None:
    pause = Pause(tmp_path, "after-latest")
    run = desk.pausing(pause).submit("ACCEL=zero3", "NODES=2", "ARGS=--dry_run")
    with paused(desk, run, pause):
        pause.path.unlink()
        for pid in pids_of(run, rank=1):
            # A child of it has ended with it.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    desk.wait_until((run.folder / "attempts/2/node-0.log").exists, run)
    with paused(desk, run, pause):
        # As Slurm would start it, had the first attempt asked for it and srun had to wait.
        late = desk.cluster.run(
            *("srun", f"--jobid={run.job_id}", "--overlap", "--mem=0", "--nodes=2", "--ntasks=2"),
            *("bash", str(run.folder / "code/slurm/task.sh"), "save"),
            environment={"SLUICE_ATTEMPT": "1", "SLUICE_RUN_FOLDER": str(run.folder)},
        )
        assert late.stdout.count("attempt 1 has not begun to train here") == 2, (
            late.stdout + late.stderr
        )
        # Nobody needs it while the job runs.
        desk.cluster.drill("restart", "controller")
        desk.cluster.drill("power-off", "node2")
    wait_until_requeued(desk, run)
    desk.cluster.drill("power-on", "node2")
    desk.wait(run)
    crashed, without_power, *more, last = run.outcomes()
    assert_they_went_on(more, run)
    assert (crashed["outcome"], crashed["next"]) == ("failed", "requeue"), run.logs()
    # Slurm may end the batch script first, which then has time to say so.
    assert without_power["outcome"] in ("lost", "failed", "stopped")
    assert last["outcome"] == "finished"
    began = [record["step"] for record in run.slurm()]
    assert 0 < began[1] < began[-1]
    assert run.curve() == desk.on_one_machine("zero3", "--dry_run").curve()
    for _, words, variables in processes():
        of_this_run = f"SLUICE_RUN_FOLDER={run.folder}".encode() in variables
        assert not (of_this_run and b"save" in words), words


def test_a_script_of_ones_own_loses_a_node_goes_on_and_is_finished(desk: Desk) -> None:
    own = desk.checkout.parent / "fit"
    shutil.copytree(CHECKOUT / "tests/real/fit", own)
    with (own / "fit.yaml").open("a") as file:
        file.write("environment: {HOLD: '10'}\n")
    run = desk.submit("JOB=../fit/fit.yaml", "NODES=2")
    losses = run.folder / "losses"
    desk.wait_until(lambda: losses.exists() and len(losses.read_text().splitlines()) == 10, run)
    desk.cluster.drill("power-off", "node2")
    wait_until_requeued(desk, run)
    desk.cluster.drill("power-on", "node2")
    desk.wait(run)
    last = run.outcomes()[-1]
    assert (last["outcome"], last["step"]) == ("finished", 20 - 8), run.logs()
    lines = losses.read_text().splitlines()
    numbers = [int(line.split()[0]) for line in lines]
    assert numbers == [*range(1, 11), *range(9, 21)]
    assert "finished" in desk.make_inside("status", f"RUN={run.name}").stdout
    # The same on one machine, in one go, to the last bit.
    done = desk.make("run", "JOB=../fit/fit.yaml", "NPROC=2", "RUNTIME=host", "ARGS=--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    (alone,) = [path for path in run.folder.parent.iterdir() if path != run.folder]
    assert (alone / "losses").read_text().splitlines() == lines[:8] + lines[10:]


def test_a_script_of_ones_own_is_asked_by_its_own_signal_saves_and_goes_on(desk: Desk) -> None:
    own = desk.checkout.parent / "saves"
    own.mkdir()
    shutil.copy(CHECKOUT / "tests/real/fit/saves.py", own)
    (own / "saves.yaml").write_text(
        "script: saves.py\nsignal: TERM\nresume_arguments: [--resume]\ncheckpoints: saved\n"
        "resources: {gpus_per_node: 0}\n"
    )
    run = desk.submit(f"JOB={own / 'saves.yaml'}")
    desk.wait_until((run.folder / "ready").exists, run)
    # Slurm's word before the limit is USR1; what the job's file says reaches the script.
    desk.cluster.output("scancel", "--batch", "--signal=USR1", run.job_id)
    desk.wait(run)
    first, last = run.outcomes()
    assert (run.folder / "saved").read_text() == "SIGTERM"
    assert (first["outcome"], first["reason"], first["next"]) == ("stopped", "SIGTERM", "requeue")
    assert last["outcome"] == "finished", run.logs()


POINT = """
import argparse
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--lr")
parser.add_argument("--seed")
options = parser.parse_args()
Path("ready").touch()
while not Path("go").exists():
    time.sleep(0.1)
Path("checkpoints").mkdir(exist_ok=True)
Path("checkpoints/point").write_text(f"{options.lr} {options.seed}")
"""


def test_a_sweep_runs_two_at_once_and_survives_the_loss_of_a_node(desk: Desk) -> None:
    own = desk.checkout.parent / "sweep"
    own.mkdir()
    (own / "point.py").write_text(POINT)
    (own / "point.yaml").write_text("script: point.py\nresources: {gpus_per_node: 0}\n")
    words = [f"JOB={own / 'point.yaml'}", "GRID=lr=1e-5,2e-5 seed=1,2", "MAX=2", "NAME=study"]
    site = desk.site(sbatch_flags=("--exclusive",))
    planned = desk.make_inside("sweep", *words, "PLAN=1", site=site)
    assert planned.returncode == 0, planned.stderr
    assert "4 runs, at most 2 at once, 4.0 node-hours at most" in planned.stdout
    done = desk.make_inside("sweep", *words, site=site)
    assert done.returncode == 0, done.stderr
    runs = [Run(path) for path in sorted((desk.checkout / "runs/point").glob("*-study-*"))]
    assert len(runs) == 4
    runs.sort(key=lambda run: int(run.job_id))
    first, second, *others = runs
    for run in (first, second):
        desk.wait_until((run.folder / "ready").exists, run)
    waiting = desk.cluster.output("squeue", "--noheader", "--states=PENDING", "--format=%i %r")
    assert sorted(waiting.splitlines()) == [f"{run.job_id} Dependency" for run in others]
    lost = first if first.slurm()[0]["nodes"] == ["node2"] else second
    desk.cluster.drill("power-off", "node2")
    wait_until_requeued(desk, lost)
    desk.cluster.drill("power-on", "node2")
    for run in runs:
        (run.folder / "go").touch()
    for run in runs:
        desk.wait(run)
        assert run.outcomes()[-1]["outcome"] == "finished", run.logs()
    found = [(run.folder / "checkpoints/point").read_text() for run in runs]
    assert sorted(found) == ["1e-5 1", "1e-5 2", "2e-5 1", "2e-5 2"]
    shown = desk.make_inside("status", "NAME=study").stdout
    assert shown.count("finished") == 4
    ended = desk.make_inside("cancel", "NAME=study")
    assert (ended.returncode, "none of its runs is in the queue" in ended.stderr) == (2, True)


def test_a_cut_link_costs_the_steps_since_the_last_checkpoint(desk: Desk, tmp_path: Path) -> None:
    pause = Pause(tmp_path, "after-latest")
    run = desk.pausing(pause).submit("ACCEL=ddp", "NODES=2", "ARGS=--dry_run")
    # What runs there goes on, and cannot know that it is alone.
    with paused(desk, run, pause):
        desk.cluster.drill("cut", "node2")
    wait_until_requeued(desk, run)
    desk.cluster.drill("join", "node2")
    desk.wait(run)
    first, *more, last = run.outcomes()
    assert_they_went_on(more, run)
    assert first["outcome"] in ("lost", "failed", "stopped"), run.logs()
    assert last["outcome"] == "finished"
    assert run.slurm()[-1]["step"] > 0
    assert run.curve() == desk.on_one_machine("ddp", "--dry_run").curve()


def wait_until_requeued(desk: Desk, run: Run) -> None:
    """Wait until Slurm has missed the node (SlurmdTimeout) and ended what is left (KillWait)."""
    desk.wait_until(lambda: desk.cluster.state_of(run.job_id) == "PENDING", run, every_s=1.0)


def assert_they_went_on(outcomes: list[dict[str, Any]], run: Run) -> None:
    """Check attempts that only a node which has just come back explains, one for each reason.

    Slurm may start the job there before the node is quite ready. And what it could not tell the
    node before, to end the job, it tells it now: the new attempt is sent TERM, and after KillWait
    KILL. It has saved by then or not, and goes on.
    """
    assert len(outcomes) <= 2, run.logs()
    assert [outcome["next"] for outcome in outcomes] == ["requeue"] * len(outcomes), run.logs()
