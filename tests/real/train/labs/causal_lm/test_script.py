"""Lab 2 on two processes: every strategy and method ends where one process that never stopped does.

The runs of two processes are each stopped half-way and resumed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runfolder.checkpoints import published
from tests import ranks
from tests.conftest import read_metrics
from tests.ranks import STRATEGIES
from train.engine import checkpoint_reader

# Sums in another order, as in test_trajectories (which compares the gradient norms, too).
TOLERANCE = 2e-5
# test_trajectories has every strategy with full weights.
FULL = ("ddp", "zero3")
SETTINGS = [
    *("--dry_run", "--max_steps", "4", "--log_every_steps", "1", "--sample.max_new_tokens", "4"),
    *("--evaluation.every_steps", "2", "--checkpoint.every_steps", "2"),
    *("--schedule.warmup_steps", "0"),
]
# What is given in a run's settings besides. At the dry run's rate, of adapters, the first steps of
# all weights blow up the last bits.
METHODS = {
    "full": ["--method", "full", "--optimizer.lr", "2e-3", "--export", "false"],
    "lora": ["--method", "lora"],
}
Runs = dict[str, Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]) -> Runs:
    """Return the run folders: `ddp-lora` and the like, and `lora` of a single process."""
    folder = tmp_path_factory.mktemp("runs")

    def train(accel: str, num_processes: int, method: str, run: Path) -> None:
        words = [*SETTINGS, *METHODS[method], "--run_folder", str(run)]
        words.insert(0, "train.labs.causal_lm.script")
        done = ranks.run(accel, num_processes, *words, environment=clean_environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "\nresuming from step-00000003" in done.stdout
        # Nothing that another library warns of reaches the user.
        assert "Warning" not in done.stderr, done.stderr

    train("ddp", 1, "lora", folder / "lora")
    for accel in STRATEGIES:
        for method in METHODS:
            if method == "lora" or accel in FULL:
                train(accel, 2, method, folder / f"{accel}-{method}")
    return {run.name: run for run in folder.iterdir()}


def arithmetic(run: Path) -> list[dict[str, Any]]:
    keys = ("step", "loss", "lr", "tokens", "validation_loss", "bits_per_byte")
    return [{key: line[key] for key in keys if key in line} for line in read_metrics(run)]


@pytest.mark.computes(2)
def test_two_processes_learn_what_one_does_under_every_strategy(runs: Runs) -> None:
    for method, reference, strategies in (
        ("lora", runs["lora"], STRATEGIES),
        ("full", runs["ddp-full"], FULL),
    ):
        expected = arithmetic(reference)
        assert [line["step"] for line in expected] == list(range(5))
        assert expected[4]["validation_loss"] < expected[0]["validation_loss"] - 0.02
        for accel in strategies:
            found = arithmetic(runs[f"{accel}-{method}"])
            for line, expected_line in zip(found, expected, strict=True):
                assert line == pytest.approx(expected_line, abs=TOLERANCE), (accel, method)


def test_the_whole_text_is_scored_though_it_does_not_divide(runs: Runs) -> None:
    # Before the training nothing depends on the order of sums but the last bits.
    one, two = (arithmetic(runs[name])[0] for name in ("lora", "ddp-lora"))
    assert one["validation_loss"] == pytest.approx(two["validation_loss"], abs=1e-9)


def test_samples_are_the_same_under_every_strategy(runs: Runs) -> None:
    texts = {
        name: [
            json.loads(line)["text"]
            for line in (run / "samples.jsonl").read_text().splitlines()
            if json.loads(line)["when"] == "before"
        ]
        for name, run in runs.items()
    }
    assert all(text == texts["lora"] for text in texts.values()), texts


def test_checkpoints_hold_the_same_adapters_and_merge(runs: Runs) -> None:
    def adapters(run: Path) -> dict[str, torch.Tensor]:
        read, names = checkpoint_reader.reader(published(run / "checkpoints")[0])
        return {name: read(name, "weight") for name in names}

    expected = adapters(runs["lora"])
    assert len(expected) == 2 * 7 * 2
    for accel in STRATEGIES:
        found = adapters(runs[f"{accel}-lora"])
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            # An element whose gradient is near zero moves by its sign; the others agree.
            near = torch.isclose(weight, expected[name], rtol=0, atol=1e-3)
            assert near.float().mean() > 0.99, (accel, name)
    merged, single = (
        load_file(runs[name] / "export/model.safetensors") for name in ("ddp-lora", "lora")
    )
    assert merged.keys() == single.keys()
    for name, weight in merged.items():
        assert torch.isclose(weight, single[name], rtol=0, atol=1e-3).float().mean() > 0.99, name
