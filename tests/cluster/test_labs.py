"""The labs as jobs on two nodes, in the image: each is cancelled in its midst, and goes on."""

from __future__ import annotations

import json

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
    "rag": "--dry_run --batch_size 1 --data.passages many.jsonl",
    "ag_news": "--dry_run --max_steps 3000",
    "causal_lm": "--dry_run --max_steps 3000",
    "imdb": "--dry_run --freeze none --max_steps 3000",
}
# Then fewer, so that they end soon. The batches of rag follow from its passages.
SHORTER = 20
NUM_TOWNS = 1500


@pytest.fixture(scope="module")
def continued(desk: Desk) -> dict[str, Run]:
    """A run of each lab that was cancelled in its midst and queued again, all of them at once."""
    many = desk.checkout / "many.jsonl"
    rows = (
        {"title": f"Town {i}", "context": f"Town {i} has {i} houses."} for i in range(NUM_TOWNS)
    )
    many.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = {
        job: desk.submit(f"JOB={job}", "NODES=2", "GPUS=0", f"ARGS={arguments}")
        for job, arguments in LABS.items()
    }
    waiting = dict(runs)

    def cancel_those_that_saved() -> bool:
        for job, run in list(waiting.items()):
            if any(run.folder.glob("checkpoints/step-*")):
                cancelled = desk.make("cancel", f"RUN={run.name}")
                assert cancelled.returncode == 0, cancelled.stderr
                del waiting[job]
        return not waiting

    desk.wait_until(cancel_those_that_saved, runs["rag"], timeout=300)
    for job, run in runs.items():
        desk.wait(run)
        ends = run.outcomes()[-1]["step"] + SHORTER
        words = [] if job == "rag" else [f"ARGS=--max_steps {ends}"]
        done = desk.make("submit", f"RUN={run.name}", *words)
        assert done.returncode == 0, done.stderr
    return runs


@pytest.mark.parametrize("job", LABS)
def test_a_lab_runs_on_two_nodes_is_stopped_and_continues(
    desk: Desk, continued: dict[str, Run], job: str
) -> None:
    run = desk.wait(continued[job])
    stopped, finished = run.outcomes()
    assert (stopped["outcome"], finished["outcome"]) == ("cancelled", "finished"), run.logs()
    assert run.slurm()[0]["nodes"] == ["node1", "node2"]
    # It went on where it was stopped, and did no step twice.
    assert run.slurm()[1]["step"] == stopped["step"] > 0
    steps = [line["step"] for line in read_metrics(run.folder)]
    assert steps == sorted(set(steps)), "a step was logged twice, or out of order"
    ends = {"rag": NUM_TOWNS}.get(job, stopped["step"] + SHORTER)
    assert finished["step"] == ends
    assert (run.folder / "checkpoints" / finished["checkpoint"]).is_dir()
