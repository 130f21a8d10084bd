"""cluster/plan/fit.py: what is said without asking the script's own side."""

from __future__ import annotations

from pathlib import Path

from cluster.plan import fit
from cluster.plan.launch import Launch
from cluster.plan.request import Request
from cluster.plan.runtime import Runtime
from cluster.plan.source import Source
from cluster.site.settings import PRIVATE


def test_a_run_whose_code_cannot_predict_yet_is_said_to_be_older(tmp_path: Path) -> None:
    source = Source(
        folder=tmp_path,
        record={"job": "tinyllama", "module": "train.tinyllama"},
        accel="ddp",
        settings=tmp_path / "config.yaml",
        code=tmp_path / "code",
        is_new=False,
    )
    request = Request.of_this_machine(2, num_gpus=0)
    launch = Launch(
        source=source, request=request, runtime=Runtime(), config="{}", values={}, exported={}
    )
    assert fit.words(launch, PRIVATE) == [
        "not predicted: the run has the code of an earlier version"
    ]
