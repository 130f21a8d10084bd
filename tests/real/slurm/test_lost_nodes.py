"""Jobs that lose what they run on, for a while or for good: preempted, crashed, without power."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.moments import Pause
from tests.real.desk import Desk, assert_they_went_on, paused, pids_of, processes

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
        for pid in pids_of(run, name="rank 1"):
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
    desk.wait_until_requeued(run)
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


def test_a_cut_link_costs_the_steps_since_the_last_checkpoint(desk: Desk, tmp_path: Path) -> None:
    pause = Pause(tmp_path, "after-latest")
    run = desk.pausing(pause).submit("ACCEL=ddp", "NODES=2", "ARGS=--dry_run")
    # What runs there goes on, and cannot know that it is alone.
    with paused(desk, run, pause):
        desk.cluster.drill("cut", "node2")
    desk.wait_until_requeued(run)
    desk.cluster.drill("join", "node2")
    desk.wait(run)
    first, *more, last = run.outcomes()
    assert_they_went_on(more, run)
    assert first["outcome"] in ("lost", "failed", "stopped"), run.logs()
    assert last["outcome"] == "finished"
    assert run.slurm()[-1]["step"] > 0
    assert run.curve() == desk.on_one_machine("ddp", "--dry_run").curve()
