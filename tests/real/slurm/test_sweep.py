"""A sweep on a cluster that loses a node."""

from __future__ import annotations

import pytest

from tests.real.desk import Desk, Run

pytestmark = [
    pytest.mark.needs("slurm"),
    pytest.mark.needs("apptainer"),
    pytest.mark.computes(2),
]


@pytest.fixture(scope="module")
def desk(own_desk: Desk) -> Desk:
    """Return a checkout at a Slurm whose plugs nobody else needs."""
    return own_desk


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
    desk.wait_until_requeued(lost)
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
