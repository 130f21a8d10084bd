"""How well questions find their passages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.engine.story import say

if TYPE_CHECKING:
    import numpy as np

# The passages of a question that are kept and scored, and the ranks at which recall is measured.
DEPTH = 10
RECALL_AT = (1, 3, 5, 10)


def measure(gold: list[int], found: np.ndarray) -> dict[str, float]:
    """Return recall@k and MRR@10 of the passages found, (N, DEPTH, 2), and top-1 scores.

    recall@k is the fraction of questions whose passage is among the first k; MRR@10 the mean of
    1/rank, 0 beyond the tenth (Voorhees 1999, TREC-8 question answering track).
    """
    import numpy as np

    is_gold = found[:, :, 0] == np.array(gold)[:, None]
    places = np.where(is_gold.any(1), is_gold.argmax(1) + 1, np.inf)
    scores = {f"recall_at_{k}": float((places <= k).mean()) for k in RECALL_AT}
    scores["mrr_at_10"] = float((1 / places).mean())
    low, median = np.quantile(found[:, 0, 1], [0.05, 0.5])
    return scores | {"top_score_p05": float(low), "top_score_median": float(median)}


def say_scores(scores: dict[str, float], num_questions: int) -> None:
    """Print how well the questions found their passages."""
    if not scores:
        say("no labelled questions: nothing to measure; give them with --data.questions")
        return
    recall = "  ".join(f"@{k} {scores[f'recall_at_{k}']:.3f}" for k in RECALL_AT)
    say(f"{num_questions:,} questions: recall {recall}  MRR@10 {scores['mrr_at_10']:.3f}")
    say(
        f"score of the first passage: median {scores['top_score_median']:.3f}, "
        f"5% below {scores['top_score_p05']:.3f}; a question takes {scores['encode_ms']:.1f} ms in "
        f"the encoder, {scores['search_ms']:.2f} ms in the index"
    )
    if "recall_against_exact" in scores:
        say(f"the index finds {scores['recall_against_exact']:.4f} of what an exact one finds")
