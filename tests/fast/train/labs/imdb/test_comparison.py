"""The table of a classifier beside its baseline."""

from __future__ import annotations

import numpy as np

from train.engine.classification.scores import score
from train.labs.imdb.comparison import flat, side_by_side

PROBABILITIES_NC = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])


def test_the_table_has_a_line_for_each_name_and_says_where_a_score_does_not_exist() -> None:
    both = score([0, 1, 1], PROBABILITIES_NC, ["neg", "pos"])
    one = score([0, 0, 0], PROBABILITIES_NC, ["neg", "pos"])
    heading, first, second = side_by_side({"a long name, longer": both, "b": one}).splitlines()
    assert " ".join(heading.split()) == "on the test rows accuracy macro F1 ROC AUC"
    assert first.split()[-3:] == ["0.6667", "0.6667", "1.0000"]
    assert second.split() == ["b", "0.6667", "0.4000", "n/a"]
    assert len({len(line) for line in (heading, first, second)}) == 1
    assert flat(one, "test") == {
        "test_accuracy": 2 / 3,
        "test_macro_f1": 0.4,
        "test_roc_auc": None,
    }
