"""source.py: what a new run is told before it is queued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.plan.source import new_run, note_surprises
from tests.checkout import lay_out


@pytest.fixture
def projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders with a fit.yaml and a fit.py of their own, beside a checkout."""
    lay_out(tmp_path / "sluice", "configs/")
    monkeypatch.chdir(tmp_path / "sluice")
    monkeypatch.setenv("SLUICE_RUNS", str(tmp_path / "runs"))
    for name in ("ada", "bob"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fit.py").write_text("print(1)\n")
        (tmp_path / name / "fit.yaml").write_text("script: fit.py\n")
    return tmp_path


def notes(project: Path, *words: str) -> None:
    note_surprises(new_run(str(project / "fit.yaml"), name="", accel=""), list(words))


def test_a_job_of_another_folder_with_the_same_name_is_named(
    projects: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = projects / "runs/fit/20260101-000000-000000"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"script_folder": str(projects / "ada")}))
    notes(projects / "ada")
    assert capsys.readouterr().err == ""
    notes(projects / "bob")
    assert capsys.readouterr().err == (
        f"note: fit also has runs of {projects}/ada: RUN=fit means the newest of all; give this "
        "one a NAME=, or its job file another name\n"
    )


def test_a_path_beside_the_job_file_is_not_in_the_runs_folder(
    projects: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ada = projects / "ada"
    for name in ("data", "out", "checkpoints"):
        (ada / name).mkdir()
    (ada / "data/a.jsonl").touch()
    (ada / "fit.yaml").write_text(
        "script: fit.py\ncheckpoints: out\n"
        f"arguments: {{data: data/a.jsonl, to: out, whole: {ada}/data, text: {'x' * 999}}}\n"
    )
    notes(ada, "--lr", "1", "--more=data")
    said = "the script looks for it in the run's folder; if it means"
    assert capsys.readouterr().err.splitlines() == [
        f"note: data/a.jsonl: {said} {ada}/data/a.jsonl, give that path",
        f"note: data: {said} {ada}/data, give that path",
    ]
