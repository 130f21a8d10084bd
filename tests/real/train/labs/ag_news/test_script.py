from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import ranks
from tests.conftest import losses, read_metrics
from tests.shared import CHECKOUT
from train.engine.checkpoint_reader import find_damage

# A smaller learning rate than a dry run's: rounding, which differs with the number of processes,
# grows less from step to step.
SETTINGS = ["--config", "configs/jobs/ag_news.yaml", "--dry_run", "--log_every_steps", "1"]
SETTINGS += ["--optimizer.lr", "5e-4", "--max_steps", "24"]


@pytest.mark.computes(2)
def test_two_processes_train_and_predict_as_one(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    told = {}
    for processes, folder in ((1, one), (2, two)):
        words = ["train.labs.ag_news.script", *SETTINGS, f"--run_folder={folder}"]
        done = ranks.run("ddp", processes, *words, environment=clean_environment)
        assert done.returncode == 0, done.stderr
        assert "dry run: stopped as a cluster would stop it" in done.stdout
        told[processes] = done.stdout

    # Each process has rows of its own, and together they have those of the one.
    def first_rows(text: str) -> list[set[str]]:
        lines = re.findall(r"rank \d trains on (\d+) of 80 rows .* in step 1 on rows (.*)", text)
        assert sum(int(count) for count, _ in lines[: len(lines) // 2]) == 80
        return [set(rows.split(", ")) for _, rows in lines[: len(lines) // 2]]

    # A row shows the first micro batch only, which is a quarter of one process's share.
    rank_0, rank_1 = first_rows(told[2])
    assert len(rank_0) == len(rank_1) == 4
    assert not rank_0 & rank_1
    assert "batch 1 x 4 x 4 rows" in told[1]
    assert "batch 2 x 4 x 2 rows" in told[2]

    # The same rows in each step, and gradients of the mean over all of them: the first loss is the
    # same but for rounding, and so is every later one, which a copy that trains alone would miss.
    assert list(losses(two)) == list(range(1, 25))
    for step, loss in losses(one).items():
        assert losses(two)[step] == pytest.approx(loss, rel=1e-5 if step == 1 else 2e-3), step
    for line, other in zip(read_metrics(one), read_metrics(two), strict=True):
        assert line.get("tokens") == other.get("tokens")
        assert line.get("validation_accuracy") == other.get("validation_accuracy")

    # 41 rows do not divide among two: none is dropped, none counted twice.
    predictions = [
        [json.loads(line) for line in (folder / "seed-42/predictions.jsonl").open()]
        for folder in (one, two)
    ]
    sample = (CHECKOUT / "train/samples/ag_news/test.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in sample]
    assert len(texts) == 41
    for rows in predictions:
        assert [row["text"] for row in rows] == texts
    for row, other in zip(*predictions, strict=True):
        assert other["probabilities"] == pytest.approx(row["probabilities"], abs=5e-3)

    # A checkpoint is whole, with the state of both ranks in it.
    newest = two / "checkpoints" / (two / "checkpoints/latest").read_text().strip()
    assert newest.name == "step-00000024"
    assert find_damage(newest) is None
    files = json.loads((newest / "manifest.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "optimizer.pt"} <= set(files)
