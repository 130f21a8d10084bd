"""The lab rag: it finds, it resumes to the same end, and what is wrong is one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from runfolder.checkpoints import published
from runfolder.errors import UserError
from tests.conftest import read_metrics
from tests.shared import CHECKOUT
from train.engine import arguments, signals
from train.engine.once import staged_path
from train.labs.rag import corpus, scores, script
from train.labs.rag.settings import Config

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def configured(environment: None) -> MakeConfig:
    """Return a function that gives a dry run's settings, staged, with those of a command line."""

    def make(*words: str) -> Config:
        given = ["--dry_run", "--batch_size", "7", "--checkpoint.every_steps", "4", *words]
        config = arguments.parse(Config, given, prog="test", dry_run=script.DRY_RUN)
        return script.stage(config, online=False)

    return make


@pytest.fixture(scope="module")
def finished(
    configured: MakeConfig, device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("finished")
    assert script.train(configured(), folder, device, rehearse_stop=False) == "finished"
    return folder


def results(folder: Path) -> tuple[str, bytes]:
    """Return what a run found, and its index."""
    [index] = (folder / "index").glob("*.faiss")
    return (folder / "predictions.jsonl").read_text(), index.read_bytes()


def test_questions_find_their_passages_far_more_often_than_by_chance(finished: Path) -> None:
    outcome = json.loads((finished / "attempts/1/outcome.json").read_text())
    last = read_metrics(finished)[-1]
    assert outcome["metrics"] == last
    assert outcome["outcome"] == "finished"
    assert outcome["command"] == 'make ask RUN= Q="..."'
    assert last["recall_at_1"] <= last["recall_at_3"] <= last["recall_at_5"] <= last["recall_at_10"]
    # Random weights, and so a bag of words: by chance it were 10 of 60.
    assert last["recall_at_10"] > 0.4
    lines = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    gold_first = [line["found"][0][0] == line["passage"] for line in lines]
    assert last["recall_at_1"] == pytest.approx(np.mean(gold_first))
    assert len(lines) == 85
    assert all(len({id_ for id_, _ in line["found"]}) == 10 for line in lines)


def test_the_run_counts_its_batches_as_steps(finished: Path, configured: MakeConfig) -> None:
    config = configured()
    assert config.staged is not None
    chunks = corpus.read_chunks(staged_path(config.staged.chunks))
    assert config.max_steps == -(-len(chunks) // 7)
    steps = [line["step"] for line in read_metrics(finished)]
    assert steps == sorted(set(steps))
    assert steps[-1] == config.max_steps
    assert read_metrics(finished)[-1]["chunks"] == len(chunks)
    assert published(finished / "checkpoints")[0].name == f"step-{config.max_steps:08d}"


def test_a_run_that_is_stopped_at_any_time_ends_as_one_that_was_not(
    finished: Path,
    configured: MakeConfig,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0

    def received() -> str | None:
        nonlocal calls
        calls += 1
        # The third look of every attempt: in the batches, and at last among the questions.
        return "SIGTERM" if calls % 3 == 0 else None

    monkeypatch.setattr(signals, "received", received)
    attempts = []
    while not attempts or attempts[-1] == "stopped":
        calls = 0
        attempts.append(script.train(configured(), tmp_path, device, rehearse_stop=False))
        assert len(attempts) < 30
        if attempts[-1] == "stopped":
            newest = published(tmp_path / "checkpoints")[0]
            outcome = json.loads((tmp_path / "attempts/1/outcome.json").read_text())
            assert (outcome["outcome"], outcome["checkpoint"]) == ("stopped", newest.name)
            if newest.name == f"step-{configured().max_steps:08d}":
                # Three batches of questions would never be enough for all of them.
                monkeypatch.setattr(signals, "received", lambda: None)
    assert len(attempts) > 5
    assert results(tmp_path) == results(finished)
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == sorted(set(steps))


@pytest.fixture
def without_index(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run that has its vectors and nothing made of them."""
    ignore = shutil.ignore_patterns("index", "predictions*")
    return shutil.copytree(finished, tmp_path / "run", ignore=ignore)


def test_a_damaged_shard_is_embedded_again(
    finished: Path,
    without_index: Path,
    configured: MakeConfig,
    device: torch.device,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = without_index
    before = published(run / "checkpoints")
    shard = max((run / "vectors").iterdir())
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert script.train(configured(), run, device, rehearse_stop=False) == "finished"
    said = capsys.readouterr().out
    assert f"checkpoint {before[0].name} is damaged ({'../../vectors/' + shard.name}" in said
    assert f"resuming from {before[1].name}" in said
    assert results(run) == results(finished)


def test_with_all_checkpoints_damaged_everything_is_embedded_anew(
    finished: Path,
    without_index: Path,
    configured: MakeConfig,
    device: torch.device,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = without_index
    # All checkpoints have the oldest shard; those from before it are not kept.
    min((run / "vectors").iterdir()).unlink()
    assert script.train(configured(), run, device, rehearse_stop=False) == "finished"
    said = capsys.readouterr().out
    assert "no checkpoint is complete; all chunks are embedded again" in said
    assert "starting at step 0" in said
    assert results(run) == results(finished)


def test_an_approximate_index_takes_the_place_of_the_exact_one(
    finished: Path, configured: MakeConfig, device: torch.device, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = configured("--index.kind", "hnsw")
    assert script.train(config, run, device, rehearse_stop=False) == "finished"
    assert 0.9 < read_metrics(run)[-1]["recall_against_exact"] <= 1
    assert [file.name[:5] for file in (run / "index").glob("*.faiss")] == ["hnsw-"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--seed", "1"], r"step-.*: was made with encoder tiny, random weights \(\w{12}\.\.\.\)"),
        (["--chunks.length", "48"], "was made with chunk length 64, not 48; use the run's own"),
        (["--batch_size", "8"], "was made with batch size 7, not 8"),
    ],
)
def test_vectors_of_something_else_are_not_gone_on_with(
    finished: Path, configured: MakeConfig, device: torch.device, words: list[str], line: str
) -> None:
    before = results(finished)
    with pytest.raises(UserError, match=line):
        script.train(configured(*words), finished, device, rehearse_stop=False)
    assert results(finished) == before


def test_a_damaged_index_is_refused_and_built_again_once_it_is_gone(
    finished: Path, configured: MakeConfig, device: torch.device, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    [index] = (run / "index").glob("*.faiss")
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"index: is damaged .* delete it and rebuild it"):
        script.train(configured(), run, device, rehearse_stop=False)
    shutil.rmtree(run / "index")
    assert script.train(configured(), run, device, rehearse_stop=False) == "finished"
    assert results(run) == results(finished)


def test_passages_without_questions_are_indexed_and_nothing_is_measured(
    configured: MakeConfig,
    device: torch.device,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "notes.csv"
    file.write_text("title,text\nTide,The Moon pulls on the sea.\nSalt,It keeps meat.\n")
    run = tmp_path / "run"
    run.mkdir()
    config = configured("--data.passages", str(file))
    assert script.train(config, run, device, rehearse_stop=False) == "finished"
    assert "no labelled questions: nothing to measure" in capsys.readouterr().out
    assert "recall_at_1" not in read_metrics(run)[-1]


def test_another_strategy_is_refused(
    configured: MakeConfig, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match=r"ACCEL=fsdp2: .* this lab does not train; leave it out"):
        script.train(configured(), tmp_path, device, rehearse_stop=False)
    assert list(tmp_path.iterdir()) == []


def test_recall_and_mrr_count_the_place_of_the_passage() -> None:
    found = np.full((4, scores.DEPTH, 2), -1.0)
    found[:, :6, 0] = range(6)
    found[:, :6, 1] = 0.9
    # At places 1, 3 and 6, and not at all.
    measured = scores.measure([0, 2, 5, 9], found)
    assert [measured[f"recall_at_{k}"] for k in (1, 3, 5, 10)] == [0.25, 0.5, 0.5, 0.75]
    assert measured["mrr_at_10"] == pytest.approx((1 + 1 / 3 + 1 / 6) / 4)


# ---- wrong input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--batch_size", "0"], "--batch_size: 0 is not between 1 and 65536"),
        (["--max_steps", "7"], r"max_steps: 7 does not match \d+ chunks in batches of \d+"),
        (["--chunks.overlap", "64"], "--chunks.overlap: 64 is more than half of the 64 tokens"),
        (["--chunks.length", "300"], "chunks.length: 300 is more than the 256 tokens that the"),
        (["--chunks.lenght", "30"], "--chunks.lenght is not a setting; .*'chunks.length'"),
        (["--index.kind", "ivf"], "--index.kind: 'ivf' is not one of flat, hnsw"),
        (["--index.hnsw_search", "1"], "--index.hnsw_search: 1 is not between"),
        (["--precision", "bf16"], "--precision: this lab embeds in fp32"),
        (["--compile"], "--compile: this lab embeds in fp32, not compiled"),
        (["--export", "false"], "--export: this lab builds an index and exports no model"),
        (["--checkpoint.asynchronous", "true"], "--checkpoint.asynchronous is not a setting"),
        (["--data.passages", "{tmp}/none.csv"], "data.passages: .*none.csv does not exist"),
        (["--data.passages", "{tmp}/a.txt"], "data.passages: .*a.txt has no columns; give jsonl"),
        (
            ["--data.passages", "{tmp}/a.csv"],
            "a.csv: has no column 'text'; choose from title, body",
        ),
        (["--data.passages", "{tmp}/empty.jsonl"], "data.passages: .*empty.jsonl: holds no passag"),
        (["--data.questions", "{tmp}/a.csv"], "--data.questions: is given without data.passages"),
        (["--generator.name", "{tmp}"], "generator.name: .* holds no config.json"),
        (["--generator.name", "a/b"], 'a/b is not staged; run `make fetch JOB=rag ARGS="--gener'),
        (["--model.name", "{tmp}/x", "--model.preset", "null"], "model.name: .*x is neither"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    environment: None, tmp_path: Path, words: list[str], line: str
) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    (tmp_path / "a.csv").write_text("title,body\nTide,The Moon pulls.\n")
    (tmp_path / "empty.jsonl").touch()
    given = [word.replace("{tmp}", str(tmp_path)) for word in words]
    run = tmp_path / "run"
    with pytest.raises(UserError, match=line):
        script.SCRIPT.main(["--dry_run", "--run_folder", str(run), *given])
    assert not run.exists()


def test_a_wrong_setting_is_answered_without_torch() -> None:
    code = "import sys, train.labs.rag.script, train.ask; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=CHECKOUT)
    assert done.returncode == 0
