"""Lab 3 on two processes: the same run as on one, with dropout and rows that do not divide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DistilBertConfig, DistilBertModel

from runfolder.checkpoints import published
from tests import ranks
from tests.conftest import losses, read_metrics
from tests.shared import CHECKOUT
from train.engine import tokenization
from train.engine.checkpoint_reader import find_damage
from train.engine.data import Piece

SAMPLES = CHECKOUT / "train/samples/imdb"


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Return settings that name an encoder with dropout, 151 rows to train on and 37 to test."""
    for name, count in (("train", 151), ("test", 37)):
        lines = (SAMPLES / f"{name}.jsonl").read_text().splitlines()[:count]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    folder = tmp_path / "encoder"
    folder.mkdir()
    texts = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").open()]
    tokenization.train((Piece(text, starts=True, ends=True) for text in texts), 600, folder, "rows")
    # The encoder that most take for this, and whose config.json has names of its own.
    shape = DistilBertConfig(
        vocab_size=600,
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=128,
        max_position_embeddings=256,
    )
    assert shape.dropout == shape.attention_dropout == 0.1
    DistilBertModel(shape).save_pretrained(folder)
    return [
        *("--dry_run", "--model.preset", "null", "--model.name", str(folder)),
        *("--data.train", str(tmp_path / "train.jsonl")),
        *("--data.test", str(tmp_path / "test.jsonl")),
        *("--max_steps", "20", "--log_every_steps", "1", "--checkpoint.every_steps", "4"),
    ]


@pytest.mark.computes(2)
def test_two_processes_train_and_predict_as_one_does(
    clean_environment: dict[str, str], inputs: list[str], tmp_path: Path
) -> None:
    predictions: list[list[dict[str, Any]]] = []
    for num_processes in (1, 2):
        run = tmp_path / f"run{num_processes}"
        words = ["train.labs.imdb.script", *inputs, "--run_folder", str(run)]
        done = ranks.run("ddp", num_processes, *words, environment=clean_environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"batch {num_processes} x 4 x {4 // num_processes} rows" in done.stdout
        # It rehearsed a stop within the second phase; the step after agrees on it.
        assert "stopped by SIGUSR1 at step 11" in done.stdout
        assert "resuming from step-00000011" in done.stdout
        newest = published(run / "checkpoints")[0]
        assert newest.name == "step-00000020" and find_damage(newest) is None
        lines = (run / "predictions.jsonl").read_text().splitlines()
        predictions.append([json.loads(line) for line in lines])

    one, two = (losses(tmp_path / f"run{count}") for count in (1, 2))
    assert list(one) == list(two) == list(range(1, 21))
    # The ranks' sums are taken in another order; dropout and rows are the same.
    assert one == pytest.approx(two, abs=2e-3)
    assert max(one.values()) - min(one.values()) > 0.05
    validations = [
        [line["validation_loss"] for line in read_metrics(run) if "validation_loss" in line]
        for run in (tmp_path / "run1", tmp_path / "run2")
    ]
    assert len(validations[0]) == 4
    assert validations[0] == pytest.approx(validations[1], abs=2e-3)

    assert [line["row"] for line in predictions[1]] == list(range(37))
    for ours, others in zip(*predictions, strict=True):
        if max(ours["probabilities"]) - 0.5 > 2e-3:
            assert ours["predicted"] == others["predicted"]
        assert ours["probabilities"] == pytest.approx(others["probabilities"], abs=2e-3)
