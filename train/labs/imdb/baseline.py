"""What a text classifier must beat: TF-IDF and logistic regression, seconds on one core."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def tfidf_baseline(
    texts: Sequence[str], labels: Sequence[int], test_texts: Sequence[str]
) -> np.ndarray:
    """Return the probabilities (N, C) of the N `test_texts`, C the classes among `labels`.

    Words and pairs of words that occur in two texts at least, weighed by sublinear TF-IDF (Manning,
    Raghavan & Schuetze 2008, sections 6.2 and 6.4.1), into an L2-regularised logistic regression.
    C = 3 was the best of 1, 3 and 10 on validation rows of short film reviews. No randomness.
    """
    from sklearn.feature_extraction.text import (  # type: ignore[import-untyped]
        TfidfVectorizer,
    )
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    try:
        matrix = vectorizer.fit_transform(texts)
    except ValueError:
        # No word occurs in two texts, or there are only symbols: then use whatever there is.
        vectorizer = TfidfVectorizer(token_pattern=r"\S+")
        matrix = vectorizer.fit_transform(texts)
    classifier = LogisticRegression(C=3.0, max_iter=1000).fit(matrix, labels)
    probabilities: np.ndarray = classifier.predict_proba(vectorizer.transform(test_texts))
    return probabilities
