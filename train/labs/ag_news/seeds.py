"""The tests of a run's trainings, one for each seed: written, read back, and summarized."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runfolder.files import write_json
from train.engine.classification import scores
from train.engine.classification.scores import Scores
from train.engine.errors import RunFailed

if TYPE_CHECKING:
    from train.labs.ag_news.splits import Splits


def folder(run_folder: Path, seed: int) -> Path:
    """Return where the test of a seed is: scores.json, confusion.png, predictions.jsonl."""
    return run_folder / f"seed-{seed}"


def write_test(
    run_folder: Path,
    seed: int,
    step: int,
    rows: Splits,
    found: Scores,
    probabilities_NC: np.ndarray,
) -> None:
    """Write the test results of a seed's training, after `step` steps; scores.json comes last.

    Raises:
        RunFailed: it cannot be written.
    """
    classes, test = rows.classes, rows.test
    place = folder(run_folder, seed)
    told = {"seed": seed, "step": step, "rows": len(test), **asdict(found)}
    try:
        place.mkdir(exist_ok=True)
        predictions = place / "predictions.jsonl"
        scores.write_predictions(predictions, test.texts, test.labels, probabilities_NC, classes)
        scores.draw_confusion(found, classes, place / "confusion.png")
        write_json(place / "scores.json", told)
    except OSError as error:
        raise RunFailed(f"{place}: could not be written ({error})") from None


def read_tests(run_folder: Path, seeds: Sequence[int], *, step: int) -> dict[int, dict[str, Any]]:
    """Return the scores of the seeds that were tested after `step` steps, by seed."""
    found = {}
    for seed in seeds:
        try:
            told = json.loads((folder(run_folder, seed) / "scores.json").read_text("utf-8"))
            if told["step"] == step:
                found[seed] = told
        except (OSError, ValueError, KeyError, TypeError):
            continue  # This seed is tested again.
    return found


def summary(tests: dict[int, dict[str, Any]]) -> dict[str, float]:
    """Return test accuracy and macro F1: of one seed, or mean and sample standard deviation."""
    told = {}
    for name in ("accuracy", "macro_f1"):
        values = [test[name] for test in tests.values()]
        told[f"test_{name}"] = statistics.mean(values)
        if len(values) > 1:
            told[f"test_{name}_sd"] = statistics.stdev(values)
    return told


def sentence(tests: dict[int, dict[str, Any]]) -> str:
    """Return the summary as a line of text."""
    told = summary(tests)
    parts = []
    for name, words in (("accuracy", "accuracy"), ("macro_f1", "macro F1")):
        deviation = told.get(f"test_{name}_sd")
        spread = "" if deviation is None else f" +/- {deviation:.4f}"
        parts.append(f"{words} {told[f'test_{name}']:.4f}{spread}")
    seeds = f"seed {next(iter(tests))}" if len(tests) == 1 else f"{len(tests)} seeds"
    return f"test, {seeds}: " + ", ".join(parts)
