"""The linear baseline beside the encoder."""

from __future__ import annotations

import numpy as np

from train.labs.imdb.baseline import tfidf_baseline

TEXTS = ["a good film", "good and warm", "a bad film", "bad and cold"]


def test_it_tells_classes_apart_by_their_words_and_repeats_itself() -> None:
    probabilities_NC = tfidf_baseline(TEXTS, [1, 1, 0, 0], ["warm and good", "so bad"])
    assert probabilities_NC.shape == (2, 2)
    np.testing.assert_allclose(probabilities_NC.sum(1), 1)
    assert probabilities_NC.argmax(1).tolist() == [1, 0]
    again = tfidf_baseline(TEXTS, [1, 1, 0, 0], ["warm and good", "so bad"])
    np.testing.assert_array_equal(probabilities_NC, again)


def test_texts_without_a_word_that_comes_twice_or_any_word_have_probabilities() -> None:
    for texts in (["one", "two"], ["!!", "?"], ["\U0001f600", "\u2639"]):
        probabilities_NC = tfidf_baseline(texts, [0, 1], [*texts, "something else", "..."])
        assert probabilities_NC.argmax(1)[:2].tolist() == [0, 1]
        assert np.isfinite(probabilities_NC).all()
