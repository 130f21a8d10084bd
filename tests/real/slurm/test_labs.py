"""The labs as jobs on two nodes, in the image: each is cancelled in its midst, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.conftest import read_metrics
from tests.moments import Pause
from tests.real.desk import Desk, paused
from tests.waiting import finish

pytestmark = [
    pytest.mark.needs("slurm"),
    pytest.mark.needs("apptainer"),
    pytest.mark.computes(2),
]
LABS = {
    "rag": "--dry_run --batch_size 6",
    "ag_news": "--dry_run",
    "causal_lm": "--dry_run",
    "imdb": "--dry_run --freeze none",
}


@pytest.mark.parametrize("job", LABS)
def test_a_lab_runs_on_two_nodes_is_stopped_and_continues(
    desk: Desk, job: str, tmp_path: Path
) -> None:
    arguments, pause = LABS[job], Pause(tmp_path, "after-step", 3)
    # With GPUS, which the step that asks to save must not wait for.
    words = [f"JOB={job}", "NODES=2", "GPUS=1", f"ARGS={arguments}"]
    run = desk.pausing(pause).submit(*words, site=desk.site(save_s=120))
    with paused(desk, run, pause):
        again = desk.make("submit", f"RUN={run.name}")
        assert again.returncode == 2
        assert "its job" in again.stderr
        cancelling = desk.start("cancel", f"RUN={run.name}")
        desk.wait_until(lambda: "USR1: the processes are asked" in run.logs(), run)
    cancelled = finish(cancelling)
    assert cancelled.returncode == 0, cancelled.stderr
    assert "make submit RUN=" in cancelled.stdout
    [stopped] = desk.wait(run).outcomes()
    assert (stopped["outcome"], stopped["next"]) == ("cancelled", "stop"), run.logs()
    assert desk.cluster.state_of(run.job_id) == "CANCELLED"
    assert run.slurm()[0]["nodes"] == ["node1", "node2"]

    # Lab 2 can go on elsewhere: on one node, with another strategy.
    moved = ["NODES=1", "GPUS=0", "ACCEL=zero2", "NPROC=2"] if job == "causal_lm" else []
    # And lab 1 is told to end sooner.
    shortened = ["ARGS=--max_steps 12"] if job == "ag_news" else []
    done = desk.make("submit", f"RUN={run.name}", *moved, *shortened)
    assert done.returncode == 0, done.stderr
    finished = desk.wait(run).outcomes()[-1]
    assert finished["outcome"] == "finished", run.logs()
    assert len(run.slurm()[-1]["nodes"]) == (1 if moved else 2)
    # It went on where it was stopped, and did no step twice.
    assert run.slurm()[-1]["step"] == stopped["step"] > 0
    once_more = desk.make("submit", f"RUN={run.name}")
    assert once_more.returncode == 2
    assert "has finished; nothing was queued" in once_more.stderr
    steps = [line["step"] for line in read_metrics(run.folder)]
    assert steps == sorted(set(steps)), "a step was logged twice, or out of order"
    assert (run.folder / "checkpoints" / finished["checkpoint"]).is_dir()
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert finished["step"] == config["max_steps"] > stopped["step"]
    if shortened:
        assert finished["step"] == 12
    if moved:
        assert_same_curve(run.folder, desk, arguments)


def assert_same_curve(run_folder: Path, desk: Desk, arguments: str) -> None:
    """Check that a run which moved learned what two processes on one machine do."""
    expected = read_metrics(desk.on_one_machine("ddp", *arguments.split(), job="causal_lm").folder)
    found = read_metrics(run_folder)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        for name in {"loss", "validation_loss"} & other.keys():
            assert line[name] == pytest.approx(other[name], rel=1e-5), line
