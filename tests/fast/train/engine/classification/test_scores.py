from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from train.engine.classification.scores import (
    draw_confusion,
    mean_loss,
    score,
    table,
    write_predictions,
)

CLASSES = ["World", "Sports", "Business"]


def probabilities(predicted: list[int], num_classes: int) -> np.ndarray:
    """Return rows with most of the probability on what is predicted."""
    return np.eye(num_classes)[predicted] * 0.7 + 0.3 / num_classes


def test_scores_are_those_counted_by_hand() -> None:
    labels, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    found = score(labels, probabilities(predicted, 3), CLASSES)
    assert found.accuracy == pytest.approx(4 / 6)
    assert found.confusion == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    world, sports, business = found.per_class
    assert world == {
        "class": "World",
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(0.8),
        "support": 3,
    }
    assert (sports["precision"], sports["recall"], sports["f1"]) == (0.5, 0.5, 0.5)
    assert business["f1"] == pytest.approx(2 / 3)
    assert found.macro_f1 == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert found.roc_auc is None
    assert json.loads(json.dumps(dataclasses.asdict(found)))["accuracy"] == found.accuracy


def test_a_class_without_rows_or_predictions_counts_as_zero() -> None:
    found = score([0, 0, 1], probabilities([0, 0, 0], 3), CLASSES)
    assert [entry["f1"] for entry in found.per_class] == [pytest.approx(0.8), 0.0, 0.0]
    assert [entry["support"] for entry in found.per_class] == [2, 1, 0]
    assert found.confusion == [[2, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_roc_auc_is_the_part_of_the_pairs_in_the_right_order() -> None:
    of_one = np.array([0.1, 0.4, 0.35, 0.8])
    labels = [0, 0, 1, 1]
    found = score(labels, np.stack([1 - of_one, of_one], axis=1), ["no", "yes"])
    assert found.roc_auc == pytest.approx(3 / 4)
    assert score([1, 1], np.full((2, 2), 0.5), ["no", "yes"]).roc_auc is None
    assert "ROC AUC" in table(found)


def test_mean_loss_is_the_cross_entropy_and_stays_finite() -> None:
    rows = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
    assert mean_loss([0, 1, 0], rows) == pytest.approx((np.log(2) - np.log(0.75)) / 3)
    assert mean_loss([1], rows[2:]) == pytest.approx(-np.log(1e-12))


@pytest.mark.parametrize(
    ("labels", "rows"),
    [([], np.empty((0, 3))), ([0, 1], np.ones((3, 3))), ([0], np.ones((1, 2)))],
)
def test_what_does_not_fit_together_is_refused(labels: list[int], rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="do not fit probabilities of shape"):
        score(labels, rows, CLASSES)


def test_a_probability_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        score([0], np.array([[np.nan, 0.5, 0.5]]), CLASSES)


def test_the_table_has_a_line_for_each_class_and_the_means() -> None:
    lines = table(score([0, 1, 2], probabilities([0, 1, 1], 3), CLASSES)).splitlines()
    assert lines[0].split() == ["class", "precision", "recall", "F1", "rows"]
    assert lines[2].split() == ["Sports", "0.5000", "1.0000", "0.6667", "1"]
    assert lines[-2].split() == ["accuracy", "0.6667", "3"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("num_classes", [2, 20, 45])
def test_the_confusion_matrix_is_a_whole_picture(tmp_path: Path, num_classes: int) -> None:
    classes = [f"class of $money$ number {number}" for number in range(num_classes)]
    labels = list(range(num_classes))
    found = score(labels, probabilities(labels, num_classes), classes)
    draw_confusion(found, classes, tmp_path / "confusion.png")
    picture = (tmp_path / "confusion.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture.endswith(b"IEND\xaeB`\x82")
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]


def test_predictions_are_a_line_for_each_row(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    probabilities_NC = np.array([[0.9, 0.1], [0.25, 0.75], [0.7, 0.3]])
    write_predictions(path, ["a", "b", "c"], [0, 1, 1], probabilities_NC, ["neg", "pos"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = {"row": 2, "label": "pos", "predicted": "neg", "probabilities": [0.7, 0.3], "text": "c"}
    assert lines[2] == last
    assert [line["row"] for line in lines] == [0, 1, 2]
