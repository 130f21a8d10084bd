"""remote.py: what a command from a laptop runs in its checkout on the cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cluster.remote import calls
from cluster.site.settings import ARRIVED, Paths, Site, Slurm, Ssh
from tests.checkout import lay_out, rewrite


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(
        slurm=Slurm(partition="x", cpus_per_node=1, gpus_per_node=0),
        paths=Paths(scratch="/tmp"),
        ssh=Ssh(host="login"),
        source=tmp_path / "site.toml",
    )


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A checkout whose Python notes its words and its environment."""
    root = lay_out(tmp_path / "a checkout", "slurm/isolated.sh")
    rewrite(root / "containers/venv.sh", '#!/bin/sh\nexit "${VENV_STATUS:-0}"\n', 0o755)
    note = '#!/bin/sh\nprintf "%s\\n" "$@" >words\nenv >environment\nexit 5\n'
    rewrite(root / ".venv/bin/python", note, 0o755)
    return root


def run(site: Site, there: Path, **environment: str) -> int:
    script = calls.script(site, str(there), ["status", "--run", "it's $1"])
    env = {"PATH": os.environ["PATH"]} | environment
    return subprocess.run(["bash", "-c", script], env=env, cwd="/", check=False).returncode


def test_the_command_gets_its_words_and_nothing_that_is_for_another_python(
    site: Site, there: Path
) -> None:
    hostile = {"PYTHONPATH": "/planted", "PYTHONHOME": "/planted", "PYTHONSAFEPATH": "1"}
    assert run(site, there, **hostile) == 5
    words = (there / "words").read_text().splitlines()
    assert words == ["-m", "cluster", "status", "--run", "it's $1"]
    lines = (there / "environment").read_text().splitlines()
    assert {f"{ARRIVED}=1", f"VENV={there}/.venv"} <= set(lines)
    assert [line for line in lines if line.startswith("PYTHON")] == ["PYTHONNOUSERSITE=1"]


def test_nothing_runs_where_the_environment_could_not_be_made(site: Site, there: Path) -> None:
    assert run(site, there, VENV_STATUS="2") == 2
    assert not (there / "words").exists()


def test_only_a_job_outside_the_checkout_that_begins_anew_is_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lay_out(tmp_path / "sluice"))
    own = tmp_path / "fit/fit.yaml"
    own.parent.mkdir()
    own.write_text("script: fit.py\n")
    (own.parent / "fit.py").touch()
    for is_own, words in (
        (True, ["submit", f"--job={own}", "--nodes", "2"]),
        (True, ["check", "--job", "../fit/fit.yaml"]),
        (True, ["sweep", "--grid", "x=1", "--job", str(own), "--", "--job", "tinyllama"]),
        (True, ["submit", "--job", str(own), "--run", ""]),
        (False, ["submit", "--job=tinyllama"]),
        (False, ["submit", "--job", str(own), "--run=fit"]),
        (False, ["status", "--run", "fit"]),
        (False, ["submit", "--", "--job", str(own)]),
    ):
        assert bool(calls._own_job(words)) == is_own, words
