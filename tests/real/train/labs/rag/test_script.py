"""The lab rag on two processes: stopped, resumed, and to the digit what one process finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests import ranks
from tests.conftest import read_metrics

# 220 chunks and 85 questions in batches of 6: 37 and 15 batches, the last ones not full.
# That a stop changes nothing on one process: tests/fast/train/labs/rag/test_script.py.
WORDS = ["--dry_run", "--batch_size", "6", "--checkpoint.every_steps", "4"]


@pytest.mark.computes(2)
def test_two_processes_find_what_one_does_after_a_stop_as_well(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    for number, run in ((2, two), (1, one)):
        words = ["train.labs.rag.script", *WORDS, "--run_folder", str(run)]
        done = ranks.run("ddp", number, *words, environment=clean_environment)
        assert done.returncode == 0, done.stderr
        assert "dry run: stopped as a cluster would stop it" in done.stdout
        assert f"{number} x CPU: 60 passages" in done.stdout

    predictions = [(run / "predictions.jsonl").read_text() for run in (one, two)]
    assert predictions[0] == predictions[1]
    assert len(predictions[0].splitlines()) == 85
    last = [read_metrics(run)[-1] for run in (one, two)]
    for key in ("step", "chunks", "tokens", "recall_at_1", "recall_at_10", "mrr_at_10"):
        assert last[0][key] == last[1][key], key

    # Each chunk was embedded once, by either of the two.
    shards = sorted((two / "vectors").iterdir())
    numbers = [int(n) for shard in shards for n in load_file(shard)["numbers"]]
    assert sorted(numbers) == list(range(last[0]["chunks"]))
    assert {shard.name.split("-")[2] for shard in shards} == {"00000", "00001"}
    outcome = json.loads((two / "attempts/1/outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"]) == ("finished", 37)
