"""Jobs that lose what they run on, for a while or for good: preempted, crashed, without power."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests import waiting
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


def test_scripts_of_ones_own_lose_a_node_go_on_and_are_finished(desk: Desk, tmp_path: Path) -> None:
    own = desk.checkout.parent / "fit"
    shutil.copytree(CHECKOUT / "tests/real/fit", own, dirs_exist_ok=True)
    # One CPU of each node is enough for each, so that all of them run at once.
    whole, small = "cpus_per_node = 4\ngpus_per_node = 2", "cpus_per_node = 1\ngpus_per_node = 0"
    site = tmp_path / "site.toml"
    site.write_text(desk.site().read_text().replace(whole, small))
    with ExitStack() as stack:
        runs, pauses = {}, {}
        for name in ("fit", "ddp", "anew", "trainer"):
            (tmp_path / name).mkdir()
            # All but one have saved after step 8.
            pauses[name] = Pause(tmp_path / name, "before-step", 9)
            at_step_9 = desk.pausing(pauses[name])
            runs[name] = at_step_9.submit(f"JOB=../fit/{name}.yaml", "NODES=2", site=site)
        for name, run in runs.items():
            stack.enter_context(paused(desk, run, pauses[name]))
        desk.cluster.drill("power-off", "node2")
    # While Slurm has yet to miss the node, the same on one machine, in one go.
    reference = desk.start(
        "run", "JOB=../fit/trainer.yaml", "NPROC=2", "RUNTIME=host", "NAME=alone"
    )
    for run in runs.values():
        wait_until_requeued(desk, run)
    jobs = [run.job_id for run in runs.values()]
    desk.cluster.output("scontrol", "hold", ",".join(jobs))
    desk.cluster.drill("power-on", "node2")
    # What Slurm could not tell the node before, to end these jobs, it tells it now; the attempts
    # that this would end are seen in the test above.
    untold = re.compile(r"Agent (?:count|queue size): +[1-9]")
    waiting.wait_until(lambda: not untold.search(desk.cluster.output("sdiag")), "node2 is told")
    desk.cluster.output("scontrol", "release", ",".join(jobs))
    done = waiting.finish(reference)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, run in runs.items():
        _, *more, last = desk.wait(run).outcomes()
        assert_they_went_on(more, run)
        assert last["outcome"] == "finished", run.logs()
        if not more:
            assert last["step"] == (20 if name == "anew" else 20 - 8), run.logs()
    # One that never resumes has trained in one go in its last attempt.
    *_, straight = losses(runs["anew"])
    assert list(straight) == list(range(1, 21))
    for name in ("fit", "ddp"):
        first, *_, last_losses = losses(runs[name])
        assert f"resuming at step {min(last_losses) - 1}\n" in runs[name].logs()
        # At most the step that was under way when the node was lost is taken again.
        assert set(first) & set(last_losses) <= {9}
        assert first.items() <= straight.items()
        assert last_losses == {step: straight[step] for step in range(min(last_losses), 21)}
    assert not runs["anew"].outcomes()[-1]["saved"]
    mine = runs["trainer"].folder / "out/checkpoint-20"
    (alone,) = mine.parents[2].glob("*-alone/out/checkpoint-20")
    assert history(mine) == history(alone)
    assert [step for step, *_ in history(mine)] == [*range(1, 21)]
    weights = "model.safetensors"
    assert (mine / weights).read_bytes() == (alone / weights).read_bytes()
    assert "finished" in desk.make_inside("status", f"RUN={runs['fit'].name}").stdout


def losses(run: Run) -> list[dict[int, float]]:
    """Return the loss of each step that a script printed, for each attempt of its run."""
    logs = [(path / "node-0.log").read_text() for path in run.attempts()]
    found = [re.findall(r"^step (\d+) loss (\S+)$", log, re.MULTILINE) for log in logs]
    return [{int(step): float(loss) for step, loss in lines} for lines in found]


def history(checkpoint: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of each step that the Trainer has logged."""
    logged = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in logged if "loss" in line]


def test_the_trainer_is_asked_by_its_own_signal_saves_just_in_time_and_goes_on(
    desk: Desk,
) -> None:
    own = desk.checkout.parent / "fit"
    shutil.copytree(CHECKOUT / "tests/real/fit", own, dirs_exist_ok=True)
    # It saves only when it is asked to, and after 3 s.
    endless = "ARGS=--max_steps 1000000 --save_steps 1000000"
    run = desk.submit("JOB=../fit/jit.yaml", endless)
    desk.wait_until(lambda: has_begun(run, 1), run)
    # Slurm's word before the limit is USR1; what the job's file says reaches the script.
    desk.cluster.output("scancel", "--batch", "--signal=USR1", run.job_id)
    desk.wait_until(lambda: has_begun(run, 2), run)
    (saved,) = run.folder.glob("out/checkpoint-*")
    ended = desk.make_inside("cancel", f"RUN={run.name}")
    assert ended.returncode == 0, ended.stderr
    desk.wait(run)
    first, last = run.outcomes()
    assert (first["outcome"], first["reason"], first["next"]) == ("stopped", "SIGTERM", "requeue")
    assert last["next"] == "stop", run.logs()
    newest = max(run.folder.glob("out/checkpoint-*"), key=lambda path: int(path.name[11:]))
    # It goes on from where it was saved: no step is missing, and none counts twice. What the
    # Trainer saves at a step's end it saves before it logs the loss of that step.
    steps = [step for step, *_ in history(newest)]
    ends = [int(checkpoint.name[11:]) for checkpoint in (saved, newest)]
    assert 0 < ends[0] < ends[1]
    assert sorted({*steps, *ends}) == [*range(1, ends[1] + 1)]
    assert len(steps) == len(set(steps))


def has_begun(run: Run, attempt: int) -> bool:
    """Return whether the Trainer has logged a step in an attempt."""
    log = run.folder / f"attempts/{attempt}/node-0.log"
    return log.exists() and "'grad_norm'" in log.read_text()


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
