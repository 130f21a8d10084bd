"""Scripts that are not ours, those of docs/script-examples.md, on two nodes that lose power."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import waiting
from tests.fast.train import chat_model
from tests.moments import Pause
from tests.real.desk import Desk, Run, assert_they_went_on, paused
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


def test_scripts_of_ones_own_lose_a_node_go_on_and_are_finished(desk: Desk, tmp_path: Path) -> None:
    names = ("fit", "ddp", "anew", "trainer")
    examples(desk)
    runs, alone = lose_a_node(desk, names, tmp_path, alone=("trainer", "host"))
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
    assert_same_weights(runs["trainer"], alone)
    assert "finished" in desk.make_inside("status", f"RUN={runs['fit'].name}").stdout


def test_trl_loses_a_node_and_goes_on(desk: Desk, tmp_path: Path) -> None:
    own = examples(desk)
    chat_model.write(own / "model", "{% for m in messages %}{{ m.content }} {% endfor %}")
    with (own / "talks.jsonl").open("w") as stream:
        for n in range(64):
            turns = [{"role": "user", "content": f"{n} + 1"}]
            turns.append({"role": "assistant", "content": f"{n + 1}"})
            stream.write(json.dumps({"messages": turns}) + "\n")
    sft = (own / "sft.yaml").read_text().replace("/data/ada", str(own))
    sft = sft.replace("# On CPUs: ", "").replace("gpus_per_node: 4", "gpus_per_node: 0")
    (own / "sft.yaml").write_text(sft.replace("save_steps: 8", "save_steps: 8\n  logging_steps: 1"))
    runs, alone = lose_a_node(desk, ("sft",), tmp_path, alone=("sft", "apptainer"))
    assert_same_weights(runs["sft"], alone)


def examples(desk: Desk) -> Path:
    """Put the scripts of docs/script-examples.md beside the checkout; return their folder."""
    own = desk.checkout.parent / "fit"
    shutil.copytree(CHECKOUT / "tests/real/fit", own, dirs_exist_ok=True)
    return own


def lose_a_node(
    desk: Desk, names: tuple[str, ...], tmp_path: Path, *, alone: tuple[str, str]
) -> tuple[dict[str, Run], Run]:
    """Run examples on two nodes, at most four at once, and have one lose power before step 9.

    Returns the runs, finished, and that of one of them which ran on this machine, in one go.
    """
    # One CPU of each node is enough for each, so that all of them run at once.
    whole, small = "cpus_per_node = 4\ngpus_per_node = 2", "cpus_per_node = 1\ngpus_per_node = 0"
    site = tmp_path / "site.toml"
    site.write_text(desk.site().read_text().replace(whole, small))
    with ExitStack() as stack:
        runs, pauses = {}, {}
        for name in names:
            (tmp_path / name).mkdir()
            # All but `anew` have saved after step 8.
            pauses[name] = Pause(tmp_path / name, "before-step", 9)
            at_step_9 = desk.pausing(pauses[name])
            runs[name] = at_step_9.submit(f"JOB=../fit/{name}.yaml", "NODES=2", site=site)
        for name, run in runs.items():
            stack.enter_context(paused(desk, run, pauses[name]))
        desk.cluster.drill("power-off", "node2")
    # While Slurm has yet to miss the node.
    script, runtime = alone
    words = [f"JOB=../fit/{script}.yaml", "NPROC=2", f"RUNTIME={runtime}", f"NAME={script}-alone"]
    reference = desk.start("run", *words)
    for run in runs.values():
        desk.wait_until_requeued(run)
    jobs = [run.job_id for run in runs.values()]
    desk.cluster.output("scontrol", "hold", ",".join(jobs))
    desk.cluster.drill("power-on", "node2")
    # What Slurm could not tell the node before, to end these jobs, it tells it now; the attempts
    # that this would end are seen in test_lost_nodes.py.
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
    (folder,) = (desk.checkout / "runs" / script).glob("*-alone")
    return runs, Run(folder)


def assert_same_weights(run: Run, alone: Run) -> None:
    """Check what a Trainer logged and saved, to the last bit."""
    mine, its = (each.folder / "out/checkpoint-20" for each in (run, alone))
    assert history(mine) == history(its)
    assert [step for step, *_ in history(mine)] == [*range(1, 21)]
    weights = "model.safetensors"
    assert (mine / weights).read_bytes() == (its / weights).read_bytes()


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
    examples(desk)
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
