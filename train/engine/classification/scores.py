"""Scores of a classification: accuracy, F1, a table, a picture; computed here, no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runfolder.files import write_atomically
from train.engine.durable import fsync


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of a split; `dataclasses.asdict` of it is JSON."""

    accuracy: float
    macro_f1: float
    """The mean of the classes' F1, so that a rare class counts as much as a frequent one."""
    per_class: list[dict[str, Any]]
    """For each class, in order: class, precision, recall, f1 and support (its rows)."""
    confusion: list[list[int]]
    """confusion[i][j]: the rows of class i that were predicted as class j."""
    roc_auc: float | None
    """The area under the ROC curve of class 1; for two classes, if both have rows."""


def score(labels: Sequence[int], probabilities_NC: np.ndarray, classes: Sequence[str]) -> Scores:
    """Return the scores of N rows; the prediction is the class of the highest probability.

    `labels` holds the number of each row's class, `probabilities_NC` one row of shape (C,) for
    each. A division by zero (the precision of a class that was never predicted) counts as 0.

    Raises:
        ValueError: the shapes do not match, there are no rows, or a probability is not a
            number.
    """
    from sklearn.metrics import (  # type: ignore[import-untyped]
        confusion_matrix,
        precision_recall_fscore_support,
        roc_auc_score,
    )

    truth_N = np.asarray(labels)
    if len(truth_N) == 0 or probabilities_NC.shape != (len(truth_N), len(classes)):
        raise ValueError(
            f"{len(truth_N)} labels and {len(classes)} classes do not fit probabilities of shape "
            f"{probabilities_NC.shape}"
        )
    if not np.isfinite(probabilities_NC).all():
        raise ValueError("a probability is not a number")
    predicted_N = probabilities_NC.argmax(axis=1)
    numbers = list(range(len(classes)))
    columns = precision_recall_fscore_support(
        truth_N, predicted_N, labels=numbers, zero_division=0.0
    )
    per_class = [
        {
            "class": name,
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "support": int(support),
        }
        for name, precision, recall, f1, support in zip(classes, *columns, strict=True)
    ]
    roc_auc = None
    if len(classes) == 2 and len(set(truth_N.tolist())) == 2:
        roc_auc = float(roc_auc_score(truth_N, probabilities_NC[:, 1]))
    return Scores(
        accuracy=float((predicted_N == truth_N).mean()),
        macro_f1=float(np.mean([entry["f1"] for entry in per_class])),
        per_class=per_class,
        confusion=confusion_matrix(truth_N, predicted_N, labels=numbers).tolist(),
        roc_auc=roc_auc,
    )


def mean_loss(labels: Sequence[int], probabilities_NC: np.ndarray) -> float:
    """Return the mean cross-entropy of N rows, in nats; a probability of 0 counts as 1e-12."""
    truth_N = probabilities_NC[np.arange(len(labels)), np.asarray(labels)].astype(np.float64)
    return float(-np.log(truth_N.clip(1e-12)).mean())


def write_predictions(
    path: Path,
    texts: Sequence[str],
    labels: Sequence[int],
    probabilities_NC: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Write a line of JSON for each row: its class, the predicted one, and all probabilities."""
    lines = []
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        entry = {
            "row": row,
            "label": classes[label],
            "predicted": classes[int(probabilities_NC[row].argmax())],
            "probabilities": [round(float(p), 6) for p in probabilities_NC[row]],
            "text": text,
        }
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))


def table(scores: Scores) -> str:
    """Return the per-class table, with the means at the bottom, as lines of text."""
    width = max(len("macro F1"), *(len(entry["class"]) for entry in scores.per_class))
    lines = [f"{'class':<{width}}  precision  recall      F1   rows"]
    lines += [
        f"{entry['class']:<{width}}  {entry['precision']:>9.4f}  {entry['recall']:>6.4f}  "
        f"{entry['f1']:>6.4f}  {entry['support']:>5}"
        for entry in scores.per_class
    ]
    rows = sum(entry["support"] for entry in scores.per_class)
    lines += [
        f"{name:<{width}}  {'':>9}  {'':>6}  {value:>6.4f}  {rows:>5}"
        for name, value in (("accuracy", scores.accuracy), ("macro F1", scores.macro_f1))
    ]
    if scores.roc_auc is not None:
        lines.append(f"{'ROC AUC':<{width}}  {'':>9}  {'':>6}  {scores.roc_auc:>6.4f}  {rows:>5}")
    return "\n".join(lines)


def draw_confusion(scores: Scores, classes: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix as a PNG: true classes down, predicted ones across.

    Colours follow the fraction of the true class, so that a rare class is as visible as a frequent
    one; the numbers are rows. The file appears whole.
    """
    # Not pyplot, which would look for a display and keep the figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts_CC = np.array(scores.confusion)
    parts_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)
    names = [name if len(name) <= 24 else f"{name[:23]}\u2026" for name in classes]
    many = len(names) > 20
    side = min(3.0 + 0.55 * len(names), 16.0)
    figure = Figure(figsize=(side + 1.0, side), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(parts_CC, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=axes, label="fraction of the true class")
    # A dollar sign would begin a formula.
    safe = [name.replace("$", r"\$") for name in names]
    every = 1 if not many else -(-len(names) // 20)
    ticks = range(0, len(names), every)
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(ticks, [safe[i] for i in ticks], **turned)  # type: ignore[arg-type]
    axes.set_yticks(ticks, [safe[i] for i in ticks])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"accuracy {scores.accuracy:.4f}, macro F1 {scores.macro_f1:.4f}")
    if not many:
        for i, row in enumerate(counts_CC.tolist()):
            for j, count in enumerate(row):
                colour = "white" if parts_CC[i, j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=9)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        canvas.print_png(stream)
    fsync(temporary)
    temporary.replace(path)
