"""The labs as jobs on two nodes, in the image: each is cancelled in its midst, and goes on."""

from __future__ import annotations

import json

import pytest

from tests.cluster.desk import Desk
from tests.conftest import read_metrics

pytestmark = [
    pytest.mark.needs("slurm"),
    pytest.mark.needs("apptainer"),
    pytest.mark.timeout(900),
    pytest.mark.slow,
    pytest.mark.distributed,
]
# More steps than a dry run has, so that the jobs are not done before they are cancelled.
LABS = {
    "rag": "--dry_run --batch_size 1 --data.passages many.jsonl --checkpoint.every_steps 50",
    "ag_news": "--dry_run --max_steps 3000",
    "causal_lm": "--dry_run --max_steps 3000",
    "imdb": "--dry_run --freeze none --max_steps 3000",
}
# Then fewer, so that they end soon. The batches of rag follow from its passages.
SHORTER = 20
TOWNS = 800


@pytest.mark.parametrize("job", LABS)
def test_a_lab_runs_on_two_nodes_is_stopped_and_continues(desk: Desk, job: str) -> None:
    if job == "rag":
        rows = ({"title": f"Town {i}", "context": f"Town {i} has a mill."} for i in range(TOWNS))
        many = desk.checkout / "many.jsonl"
        many.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = desk.submit(f"JOB={job}", "NODES=2", "GPUS=0", f"ARGS={LABS[job]}")
    desk.wait_until(lambda: any(run.folder.glob("checkpoints/step-*")), run)
    cancelled = desk.make("cancel", f"RUN={run.name}")
    assert cancelled.returncode == 0, cancelled.stderr
    [stopped] = desk.wait(run).outcomes()
    assert stopped["outcome"] == "cancelled", run.logs()
    assert run.slurm()[0]["nodes"] == ["node1", "node2"]

    ends = TOWNS if job == "rag" else stopped["step"] + SHORTER
    words = [] if job == "rag" else [f"ARGS=--max_steps {ends}"]
    done = desk.make("submit", f"RUN={run.name}", *words)
    assert done.returncode == 0, done.stderr
    finished = desk.wait(run).outcomes()[-1]
    assert finished["outcome"] == "finished", run.logs()
    assert finished["step"] == ends
    # It went on where it was stopped, and did no step twice.
    assert run.slurm()[-1]["step"] == stopped["step"] > 0
    steps = [line["step"] for line in read_metrics(run.folder)]
    assert steps == sorted(set(steps)), "a step was logged twice, or out of order"
    assert (run.folder / "checkpoints" / finished["checkpoint"]).is_dir()
