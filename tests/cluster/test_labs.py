"""The labs as jobs on two nodes, in the image: each is cancelled in its midst, and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.desk import Desk, Run
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
    "ag_news": "--dry_run --max_steps 3000",
    "causal_lm": "--dry_run --max_steps 3000",
    "imdb": "--dry_run --freeze none --max_steps 3000",
    "rag": "--dry_run --batch_size 1 --data.passages many.jsonl",
}
# Then fewer, so that they end soon. The batches of rag follow from its passages.
SHORTER = 20


@pytest.fixture(scope="module")
def submitted(desk: Desk) -> dict[str, Run]:
    """A job for each lab, all queued at once, so that they share the nodes."""
    many = desk.checkout / "many.jsonl"
    rows = ({"title": f"Town {i}", "text": f"Town {i} has {i} houses."} for i in range(4000))
    many.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        job: desk.submit(f"JOB={job}", "NODES=2", "GPUS=0", f"ARGS={arguments}")
        for job, arguments in LABS.items()
    }


def first_checkpoint(run: Run) -> Path | None:
    return next(run.folder.glob("checkpoints/step-*"), None)


@pytest.mark.parametrize("job", LABS)
def test_a_lab_runs_on_two_nodes_is_stopped_and_continues(
    desk: Desk, submitted: dict[str, Run], job: str
) -> None:
    run = submitted[job]
    desk.wait_until(lambda: first_checkpoint(run) is not None, run, timeout=200)
    cancelled = desk.make("cancel", f"RUN={run.name}")
    assert cancelled.returncode == 0, cancelled.stderr
    desk.wait(run)
    stopped = run.outcomes()[-1]
    assert stopped["outcome"] == "cancelled", run.logs()
    assert (run.folder / f"checkpoints/step-{stopped['step']:08}").is_dir()
    assert run.slurm()[0]["nodes"] == ["node1", "node2"]

    ends = stopped["step"] + SHORTER
    words = [] if job == "rag" else [f"ARGS=--max_steps {ends}"]
    done = desk.make("submit", f"RUN={run.name}", *words)
    assert done.returncode == 0, done.stderr
    desk.wait(run)
    finished = run.outcomes()[-1]
    assert finished["outcome"] == "finished", run.logs()
    assert run.slurm()[-1]["step"] == stopped["step"]
    steps = [line["step"] for line in read_metrics(run.folder)]
    assert steps == sorted(set(steps)), "a step was logged twice, or out of order"
    if job != "rag":
        assert finished["step"] == ends
