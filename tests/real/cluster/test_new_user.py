"""What the README tells a new user to do at a cluster, done by one: no root, no site.toml."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.real.accounts import Account
from tests.real.desk import Run

pytestmark = [
    pytest.mark.needs("slurm"),
    pytest.mark.needs("apptainer"),
    pytest.mark.computes(2),
]


def test_from_a_clone_to_a_finished_run_on_two_nodes_that_resolve_no_names(
    builder: Account, builder_checkout: Path, image: Path, apptainer: str
) -> None:
    def make(*words: str) -> str:
        settings = {"APPTAINER": apptainer}
        done = builder.run("make", *words, cwd=builder_checkout, environment=settings)
        assert done.returncode == 0, f"make {words}: {done.stdout}{done.stderr}"
        return done.stdout

    (builder_checkout / "images").mkdir(exist_ok=True)
    for file in (image, image.with_suffix(".json")):
        if not (builder_checkout / "images" / file.name).exists():
            (builder_checkout / "images" / file.name).symlink_to(file)
    try:
        # As README.md has it, but for a site with poor name service.
        assert "is up after" in make("cluster-up", "ARGS=--no-names")
        submitted = make("submit", "NODES=2", "ARGS=--dry_run")
        followed = make("logs", "RUN=tinyllama")
        assert "saved as step-" in followed
        assert "step     20" in followed
        assert "---- finished" in followed
        assert "make generate RUN=" in followed
        name = re.search(r"make logs RUN=(\S+)", submitted)
        assert name
        run = Run(builder_checkout / "runs" / name[1])
        shown = json.loads(make("status", "FORMAT=json"))
        assert [row["state"] for row in shown["runs"]] == ["finished"]
        assert "finished" in make("status")
    finally:
        make("cluster-down")
    assert not (builder_checkout / ".cluster").exists()
    assert run.slurm()[0]["nodes"] == ["node1", "node2"]
    alone = re.search(r"run folder (\S+)", make("dry-run"))
    assert alone
    assert run.curve() == Run(builder_checkout / alone[1]).curve()
