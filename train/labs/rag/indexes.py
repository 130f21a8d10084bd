"""An index of vectors: built, written atomically with its identity, and searched.

The scores are cosines: inner products of vectors of length one. torch and faiss are loaded by the
functions that need them, because a script's settings import `IndexSettings`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from runfolder.errors import UserError
from runfolder.files import write_json
from train.engine.durable import describe, fsync, sha256
from train.engine.errors import RunFailed

if TYPE_CHECKING:
    pass

FORMAT = 1
# Scores are rounded to this many decimals: a matrix product's last bits depend on the number of
# queries in it. Equal scores are ordered by the passage's number.
DECIMALS = 5


@dataclass(kw_only=True)
class IndexSettings:
    """How vectors are searched."""

    kind: Literal["flat", "hnsw"] = "flat"
    """flat: exact, compares with every vector; fine below a million. hnsw: a graph (Malkov &
    Yashunin 2016, arXiv:1603.09320), faster and approximate."""
    hnsw_links: int = 32
    """Links of a vector in the graph."""
    hnsw_build: int = 200
    """Candidates examined while the graph is built (efConstruction)."""
    hnsw_search: int = 64
    """Candidates examined in a search (efSearch): more is slower and finds more."""

    def __post_init__(self) -> None:
        for name in ("hnsw_links", "hnsw_build", "hnsw_search"):
            value = getattr(self, name)
            if not 2 <= value <= 4096:
                raise UserError(f"index.{name}: {value} is not between 2 and 4096")


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A passage that a search found, by the best of its chunks."""

    passage: int
    chunk: int
    score: float
    """The cosine of question and chunk, in [-1, 1]."""


# ---- what an index is made of ---------------------------------------------------------------


def check_identity(made_of: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raise `UserError`, with the difference, unless vectors match the current inputs.

    An encoder is identified by its weights: it may have been moved.
    """
    for key, value in now.items():
        if made_of.get(key) == value or key in ("encoder", "revision"):
            continue
        before, after = _short(made_of.get(key)), _short(value)
        if key == "weights_sha256":
            before, after = (
                f"{part.get('encoder')} ({sha})" for part, sha in ((made_of, before), (now, after))
            )
            key = "encoder"
        raise UserError(
            f"{where}: was made with {key.replace('_', ' ')} {before}, not {after}; use the run's "
            "own, or start a new run"
        )


def _short(value: object) -> str:
    text = str(value)
    is_hash = len(text) == 64 and text.isalnum()
    return f"{text[:12]}..." if is_hash else text


# ---- building and keeping -------------------------------------------------------------------


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return float32 vectors, (N, D), each divided by its length."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


def build(vectors: np.ndarray, settings: IndexSettings) -> Any:
    """Return an index over unit vectors, (N, D)."""
    faiss = _faiss()
    dimension = vectors.shape[1]
    if settings.kind == "flat":
        index = faiss.IndexFlatIP(dimension)
        index.add(vectors)
        return index
    index = faiss.IndexHNSWFlat(dimension, settings.hnsw_links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = settings.hnsw_build
    index.hnsw.efSearch = settings.hnsw_search
    # With several threads the graph depends on which of them comes first.
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    index.add(vectors)
    faiss.omp_set_num_threads(threads)
    return index


def publish(folder: Path, index: Any, identity: dict[str, Any], kind: dict[str, Any]) -> None:
    """Write an index and its manifest; until that is there, an earlier index is used.

    Raises:
        RunFailed: it cannot be written.
    """
    unpublished = folder / ".unfinished.faiss"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _faiss().write_index(index, str(unpublished))
        except RuntimeError as error:
            raise OSError(str(error).strip().splitlines()[-1]) from None
        entry = describe(unpublished)
        name = f"{kind['kind']}-{entry['sha256'][:12]}.faiss"
        unpublished.rename(folder / name)
        fsync(folder)
        manifest = {"format": FORMAT, "file": name, **entry, "index": kind, "made_of": identity}
        write_json(folder / "manifest.json", manifest)
        for old in folder.glob("*.faiss"):
            if old.name != name:
                old.unlink()
    except OSError as error:
        raise RunFailed(f"{folder}: cannot be written: {error.strerror or error}") from None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of an index, or None where there is no index.

    Raises:
        UserError: it cannot be read, or was written by a newer Sluice.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        newer = manifest["format"] > FORMAT
        manifest["file"], manifest["sha256"], manifest["index"], manifest["made_of"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(folder, "manifest.json cannot be read") from None
    if newer:
        raise UserError(f"{path}: has format {manifest['format']}; this Sluice reads {FORMAT}")
    found: dict[str, Any] = manifest
    return found


def load(folder: Path, identity: dict[str, Any]) -> Any:
    """Return the index of a folder.

    Raises:
        UserError: there is none, it is damaged, or it does not match `identity`.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: has no index; let the run finish, with `make run RUN=...`")
    check_identity(manifest["made_of"], identity, folder)
    file = folder / manifest["file"]
    if not file.is_file():
        raise _damaged(folder, f"{file.name} is missing")
    if file.stat().st_size != manifest["bytes"]:
        raise _damaged(
            folder, f"{file.name} has {file.stat().st_size} bytes instead of {manifest['bytes']}"
        )
    if sha256(file) != manifest["sha256"]:
        raise _damaged(folder, f"{file.name} does not match its sha256")
    return _faiss().read_index(str(file))


def _faiss() -> Any:
    # torch first: loaded after faiss it has been seen to crash on macOS (two OpenMP runtimes).
    import torch  # noqa: F401
    import faiss  # isort: skip

    return faiss


def _damaged(folder: Path, problem: str) -> UserError:
    return UserError(
        f"{folder}: is damaged ({problem}); delete it and rebuild it from the run's vectors, "
        "with `make run RUN=...`"
    )


# ---- searching ------------------------------------------------------------------------------


def search(index: Any, queries: np.ndarray, passages: Sequence[int], k: int) -> list[list[Hit]]:
    """Return for each query, a row of (B, D), the best `k` passages, the best first.

    `passages` gives the passage of each vector; each has one or more. A passage counts once, with
    its best chunk. Those of equal score are in the order of their numbers, also at the end of the
    list.
    """
    wanted = min(k, passages[-1] + 1)
    fetch = min(index.ntotal, 2 * wanted + 8)
    left = list(range(len(queries)))
    found: dict[int, list[Hit]] = {}
    while left:
        scores, numbers = index.search(np.ascontiguousarray(queries[left]), fetch)
        short = []
        for row, query in enumerate(left):
            hits = _best_of_each(scores[row], numbers[row], passages)
            lowest = round(float(scores[row][-1]), DECIMALS)
            # The next ones, which were not fetched, could have the same score as the last one.
            is_whole = len(hits) >= wanted and (hits[wanted - 1].score > lowest)
            if is_whole or fetch == index.ntotal:
                found[query] = hits[:wanted]
            else:
                short.append(query)
        left, fetch = short, min(index.ntotal, 2 * fetch)
    return [found[query] for query in range(len(queries))]


def _best_of_each(scores: np.ndarray, numbers: np.ndarray, passages: Sequence[int]) -> list[Hit]:
    best: dict[int, Hit] = {}
    for score, chunk in zip(scores.tolist(), numbers.tolist(), strict=True):
        if chunk < 0:  # a graph may find fewer
            continue
        hit = Hit(passage=passages[chunk], chunk=chunk, score=round(score, DECIMALS))
        known = best.get(hit.passage)
        if known is None or (-hit.score, hit.chunk) < (-known.score, known.chunk):
            best[hit.passage] = hit
    return sorted(best.values(), key=lambda hit: (-hit.score, hit.passage))


def num_agreeing(exact: list[list[Hit]], found: list[list[Hit]]) -> int:
    """Return how many passages of `exact` are among those `found` for the same query."""
    return sum(
        len({hit.passage for hit in truth} & {hit.passage for hit in hits})
        for truth, hits in zip(exact, found, strict=True)
    )
