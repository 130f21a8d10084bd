"""What a classifier and its baseline reached on the test rows, side by side."""

from __future__ import annotations

from train.engine.classification.scores import Scores

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
