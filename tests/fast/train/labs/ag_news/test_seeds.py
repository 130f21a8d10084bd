from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.labs.ag_news.seeds import read_tests, sentence, summary


def test_several_seeds_have_a_mean_and_a_sample_deviation() -> None:
    tests = {seed: {"accuracy": a, "macro_f1": 0.5} for seed, a in ((7, 0.8), (8, 0.9), (9, 0.7))}
    told = summary(tests)
    assert told["test_accuracy"] == pytest.approx(0.8)
    assert told["test_accuracy_sd"] == pytest.approx(0.1)
    assert (
        sentence(tests) == "test, 3 seeds: accuracy 0.8000 +/- 0.1000, macro F1 0.5000 +/- 0.0000"
    )


def test_one_seed_has_no_deviation() -> None:
    tests = {7: {"accuracy": 0.8, "macro_f1": 0.75}}
    assert summary(tests) == {"test_accuracy": 0.8, "test_macro_f1": 0.75}
    assert sentence(tests) == "test, seed 7: accuracy 0.8000, macro F1 0.7500"


def test_only_a_whole_test_of_this_many_steps_counts(tmp_path: Path) -> None:
    for seed, text in ((1, '{"step": 10}'), (2, '{"step": 9}'), (3, '{"step": 1'), (4, "[]")):
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "scores.json").write_text(text)
    assert read_tests(tmp_path, range(1, 6), step=10) == {1: json.loads('{"step": 10}')}
