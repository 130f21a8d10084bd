"""Building a run's index, and searching it with all ranks together."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runfolder.checkpoints import published
from runfolder.errors import UserError
from runfolder.files import write_atomically
from train.engine import signals
from train.engine.distributed import agree, from_main_process, is_main_process, world_size
from train.engine.errors import RunFailed
from train.engine.shares import gather_in_order, share
from train.labs.rag import indexes, vectors
from train.labs.rag.embedder import Embedder
from train.labs.rag.indexes import IndexSettings
from train.labs.rag.passages import Passage, Question


def publish_index(
    settings: IndexSettings, run_folder: Path, count: int, made_of: dict[str, Any]
) -> None:
    """Build the index from the vectors of the newest checkpoint, if it is not there; collective."""
    problem = None
    if is_main_process():
        folder = run_folder / "index"
        kind = asdict(settings) if settings.kind != "flat" else {"kind": "flat"}
        try:
            manifest = indexes.read_manifest(folder)
            if manifest is None or manifest["index"] != kind:
                newest = published(run_folder / "checkpoints")[0]
                built = indexes.build(vectors.load(newest, count), settings)
                indexes.publish(folder, built, made_of, kind)
        except (UserError, RunFailed, OSError) as error:
            problem = json.dumps([isinstance(error, UserError), str(error)])
    # The others wait here; without a message they would wait until the timeout.
    if problem := from_main_process(problem):
        is_users, text = json.loads(problem)
        raise UserError(text) if is_users else RunFailed(text)


def find_all(
    questions: list[Question],
    embedder: Embedder,
    to_search: tuple[Any, Any],
    owners: list[int],
    batch_size: int,
    depth: int,
    device: torch.device,
) -> tuple[np.ndarray, dict[str, float]] | None:
    """Return for each question the passages found and their scores, (N, depth, 2), and figures.

    -1 fills the places if there are fewer passages. `to_search` is the index to measure, and an
    exact one to compare it with, or None. The result is the same on every rank, and for every
    number of ranks; None if a rank was asked to stop. Collective.
    """
    approximate, exact = to_search
    starts = range(0, len(questions), batch_size)
    results, agreeing, wanted, encode_s, search_s = [], 0.0, 0.0, 0.0, 0.0
    # Every rank makes the same number of rounds, so that they check for a signal together.
    for number in range(-(-len(starts) // world_size())):
        if number < len(share(len(starts))):
            start = starts[share(len(starts))[number]]
            began = time.perf_counter()
            queries = embedder.queries([q.text for q in questions[start : start + batch_size]])
            embedded = time.perf_counter()
            hits = indexes.search(approximate, queries, owners, depth)
            search_s += time.perf_counter() - embedded
            encode_s += embedded - began
            rows = np.full((batch_size, depth, 2), -1.0)
            for row, found in enumerate(hits):
                rows[row, : len(found)] = [(hit.passage, hit.score) for hit in found]
            results.append(rows)
            if exact is not None:
                truth = indexes.search(exact, queries, owners, depth)
                agreeing += indexes.num_agreeing(truth, hits)
                wanted += sum(map(len, truth))
        if agree(signals.received() is not None, device=device)[0]:
            return None
    local = np.array(results).reshape(-1, batch_size, depth, 2)
    every = gather_in_order(local, total=len(starts)).reshape(-1, depth, 2)[: len(questions)]
    agreeing, wanted, encode_s, search_s = agree(
        agreeing, wanted, encode_s, search_s, device=device
    )
    figures = {
        "encode_ms": 1000 * encode_s / len(questions),
        "search_ms": 1000 * search_s / len(questions),
    }
    return every, figures | ({"recall_against_exact": agreeing / wanted} if wanted else {})


def write_predictions(
    run_folder: Path, questions: list[Question], texts: list[Passage], found: np.ndarray
) -> None:
    """Write, for each question, its passage and the passages found, by id, with the scores."""
    lines = []
    for question, hits in zip(questions, found.tolist(), strict=True):
        there = [(texts[int(number)].id, score) for number, score in hits if number >= 0]
        line = {"question": question.text, "passage": texts[question.passage].id, "found": there}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomically(run_folder / "predictions.jsonl", "".join(lines))
