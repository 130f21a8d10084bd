"""What a classifier and its baseline said of the test rows, side by side and row by row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.engine.classification.scores import Scores
from train.engine.durable import write_atomically

COMPARED = ("accuracy", "macro_f1", "roc_auc")


def side_by_side(scores: dict[str, Scores]) -> str:
    """Return a table, as lines of text, with a line for each name."""
    width = max(map(len, ("on the test rows", *scores)))
    lines = [f"{'on the test rows':<{width}}  accuracy  macro F1  ROC AUC"]
    for name, found in scores.items():
        auc = "    n/a" if found.roc_auc is None else f"{found.roc_auc:>7.4f}"
        lines.append(f"{name:<{width}}  {found.accuracy:>8.4f}  {found.macro_f1:>8.4f}  {auc}")
    return "\n".join(lines)


def flat(scores: Scores, prefix: str) -> dict[str, float | None]:
    """Return the scores that are compared, each under `prefix` and its name."""
    return {f"{prefix}_{name}": getattr(scores, name) for name in COMPARED}


def write_predictions(
    path: Path, labels: Sequence[int], probabilities_NC: np.ndarray, classes: Sequence[str]
) -> None:
    """Write a line of JSON for each row: its class, the predicted one, and its probability."""
    lines = []
    for row, label in enumerate(labels):
        predicted = int(probabilities_NC[row].argmax())
        line = {"row": row, "label": classes[label], "predicted": classes[predicted]}
        line["probability"] = float(probabilities_NC[row, predicted])
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))
