"""cluster/plan/launch.py: one resolve, and every name that it gives is documented once."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.plan import binds, launch, resolve
from cluster.plan.image import Image
from cluster.plan.program import Program
from cluster.plan.request import Request
from cluster.plan.runtime import Runtime
from cluster.plan.source import Source, run_that_goes_on
from cluster.site.settings import PRIVATE, Container, Paths
from runfolder.errors import UserError
from tests.shared import CHECKOUT

RUN = Request.of_this_machine(2, num_gpus=0)


def source(folder: Path) -> Source:
    return Source(
        folder=folder / "run",
        record={"job": "x", "module": "train.x", "resources": {"max_restarts": 3}},
        accel="ddp",
        settings=folder / "x.yaml",
        code=folder,
        is_new=True,
    )


def table(heading: str) -> set[str]:
    """Return the names in the first column of a table of docs/architecture.md."""
    page = (CHECKOUT / "docs/architecture.md").read_text()
    section = page.partition(f"\n### {heading}\n")[2].partition("\n### ")[0].partition("\n## ")[0]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    found = [name for cell in first for name in re.findall("`(.*?)`", cell)]
    assert len(found) == len(set(found)), "a name has one meaning"
    return set(found)


def test_each_name_of_launch_env_is_documented(tmp_path: Path) -> None:
    values = launch._values(source(tmp_path), RUN, Runtime(), {}, PRIVATE)
    # Known when sbatch's words are.
    assert table("launch.env") == {*values, "sbatch_options"}


def test_each_variable_is_documented_and_there_are_few() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--", ":!docs", ":!tests", ":!*.md"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    found = set()
    for name in listed:
        text = (CHECKOUT / name).read_bytes().decode(errors="replace")
        found |= set(re.findall(r"SLUICE_[A-Z0-9_]+[A-Z0-9]", text))
    assert table("Variables") == found
    assert len(found) <= 20


def test_what_a_site_says_is_resolved_here_and_nowhere_else(tmp_path: Path) -> None:
    site = replace(
        PRIVATE,
        container=Container(variant="cpu", modules=("apptainer", "cuda/13"), flags=("--nv",)),
        paths=Paths(scratch="$TMPDIR/x", copy_datasets=True),
        environment={"NCCL_DEBUG": "WARN", "FI_PROVIDER": "tcp"},
    )
    config = {"staged": {"train": "packed/a", "model": "/models/llama", "test": None}}
    values = launch._values(source(tmp_path), RUN, Runtime(), config, site)
    assert values["scratch"] == "$TMPDIR/x", "the node knows its variables"
    assert values["modules"] == "apptainer\ncuda/13"
    assert values["copied_datasets"] == "packed/a", "a model elsewhere is bound where it is"
    assert values["site_variables"] == "NCCL_DEBUG|FI_PROVIDER"
    assert values["container_flags"] == "", "there is no container"
    assert values["max_restarts"] == "3"
    # What this machine alone knows, `make run` leaves out.
    alone = launch._values(source(tmp_path), RUN, Runtime(), config, None)
    assert (alone["binds"], alone["copied_datasets"], alone["interface"]) == ("", "", "")


def test_a_bind_of_the_site_that_would_hide_the_runs_own_is_refused() -> None:
    with pytest.raises(UserError, match="would hide the run's own /datasets"):
        binds.site_bind(PRIVATE, "/scratch:/datasets/mine:rw")
    assert binds.site_bind(PRIVATE, "/scratch:/data:rw") == "/scratch:/data:rw"


def test_a_script_that_git_ignores_is_refused_and_makes_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").touch()
    made_of, program = source(tmp_path), Program(kind="script", name="ignored/fit.py")
    made = launch.Launch(
        source=replace(made_of, record=made_of.record | {"program": program.record()}),
        request=RUN,
        runtime=Runtime(image=Image(path=tmp_path, variant="cpu", sha256="", lock_sha256="")),
        config="{}",
        values={"cache": str(tmp_path / "cache")},
        exported={},
    )
    with pytest.raises(UserError, match=r"ignored/fit\.py was not copied.*git ignores it"):
        made.write()
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".run*"))


def test_a_run_of_an_earlier_sluice_is_refused_and_its_code_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/x/20260101-000000-abcdef"
    (run / "code/slurm").mkdir(parents=True)
    (run / "run.json").write_text(
        '{"job": "x", "module": "train.x", "accel": "ddp", "num_processes": 2, '
        '"git_commit": "0123456789abcdef"}'
    )
    with pytest.raises(UserError, match=r"started by an older Sluice.*checkout of 0123456789ab"):
        run_that_goes_on(str(run), accel="")
    (run / "code/runfolder").mkdir()
    (run / "code/runfolder/launch.py").touch()
    assert run_that_goes_on(str(run), accel="zero1").accel == "zero1"


STATE = {
    "format": 1,
    "step": 20,
    "seed": 42,
    "data": "packed/a",
    "sequence_length": 64,
    "lora.rank": 8,
    "data.chat_template": None,
    "unfreezing.phases": [[0, 8]],
    "encoder weights": "abc",
    "line": {"step": 20},
}
CONFIG = {
    "seed": 42,
    "max_steps": 30,
    "staged": {"train": "packed/a"},
    "data": {"sequence_length": None, "chat_template": None},
    "lora": {"rank": 8},
    "unfreezing": {"phases": "0:8 3:9"},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"max_steps": 90}, None),
        ({"seed": 7}, "seed 42, not 7"),
        ({"staged": {"train": "packed/b"}}, "data packed/a, not packed/b"),
        ({"data": {"sequence_length": 32}}, "sequence_length 64, not 32"),
        ({"data": {"sequence_length": 64, "chat_template": "chatml"}}, "None, not chatml"),
        ({"lora": {"rank": 4}}, "lora.rank 8, not 4"),
    ],
)
def test_settings_that_a_checkpoint_depends_on_are_refused_before_a_job_is_queued(
    tmp_path: Path, change: dict[str, object], said: str | None
) -> None:
    resolve.check_goes_on(tmp_path, CONFIG | {"seed": 7})
    # The newest counts.
    for step, state in ((10, {"seed": 41}), (20, STATE)):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step:08d}/state.json").write_text(json.dumps(state))
    if said is None:
        resolve.check_goes_on(tmp_path, CONFIG | change)
        return
    with pytest.raises(UserError, match=f"step-00000020: was made with .*{said}"):
        resolve.check_goes_on(tmp_path, CONFIG | change)
