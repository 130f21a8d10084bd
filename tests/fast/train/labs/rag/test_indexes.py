"""The index: exact, one hit a passage, ties by number; kept whole, taken for no other."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runfolder.errors import UserError
from train.engine.errors import RunFailed
from train.labs.rag import indexes
from train.labs.rag.indexes import DECIMALS, IndexSettings

MADE_OF = {"encoder": "a", "weights_sha256": "1" * 64, "dimension": 8, "chunk_length": 64}
FLAT = {"kind": "flat"}


def random_vectors(count: int, seed: int, dimension: int = 8) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return indexes.unit(generator.normal(size=(count, dimension)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_search_is_that_of_every_vector_with_each_passage_once(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    owners = [passage for passage, size in enumerate(sizes) for _ in range(size)]
    # Few different vectors, so that many scores are equal.
    kinds = data.draw(st.integers(1, 5))
    vectors = random_vectors(kinds, data.draw(st.integers(0, 99)))[
        [data.draw(st.integers(0, kinds - 1)) for _ in owners]
    ]
    queries, k = random_vectors(3, 1000), data.draw(st.integers(1, 14))
    found = indexes.search(indexes.build(vectors, IndexSettings()), queries, owners, k)
    for query, hits in zip(queries, found, strict=True):
        scores = [round(float(score), DECIMALS) for score in vectors @ query]
        best = {
            passage: max(s for s, owner in zip(scores, owners, strict=True) if owner == passage)
            for passage in set(owners)
        }
        expected = sorted(best, key=lambda passage: (-best[passage], passage))[:k]
        assert [best[hit.passage] for hit in hits] == pytest.approx(
            [best[passage] for passage in expected], abs=2e-5
        )
        assert len({hit.passage for hit in hits}) == len(hits)
        assert all(owners[hit.chunk] == hit.passage for hit in hits)
        for one, other in pairwise(hits):
            assert (-one.score, one.passage) < (-other.score, other.passage)


def test_equal_passages_come_in_the_order_of_their_numbers_also_where_the_list_ends() -> None:
    vectors = np.repeat(random_vectors(1, 3), 50, axis=0)
    found = indexes.search(indexes.build(vectors, IndexSettings()), vectors[:1], range(50), 4)
    assert [hit.passage for hit in found[0]] == [0, 1, 2, 3]


def test_a_graph_is_built_alike_twice_and_finds_nearly_all() -> None:
    import faiss

    vectors, queries = random_vectors(600, 1, 32), random_vectors(20, 2, 32)
    graphs = [indexes.build(vectors, IndexSettings(kind="hnsw")) for _ in range(2)]
    images = [faiss.serialize_index(graph) for graph in graphs]
    assert np.array_equal(*images)
    exact = indexes.search(indexes.build(vectors, IndexSettings()), queries, range(600), 10)
    found = indexes.search(graphs[0], queries, range(600), 10)
    agreeing = indexes.num_agreeing(exact, found)
    assert 180 <= agreeing <= 200 == indexes.num_agreeing(exact, exact)


# ---- kept -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    built = indexes.build(random_vectors(20, 5), IndexSettings())
    indexes.publish(tmp_path / "index", built, MADE_OF, FLAT)
    return tmp_path / "index"


def test_what_is_published_is_loaded(folder: Path) -> None:
    assert indexes.load(folder, MADE_OF).ntotal == 20
    assert {file.suffix for file in folder.iterdir()} == {".faiss", ".json"}


def test_a_new_index_takes_the_place_of_the_old_one(folder: Path) -> None:
    indexes.publish(folder, indexes.build(random_vectors(9, 5), IndexSettings()), MADE_OF, FLAT)
    assert indexes.load(folder, MADE_OF).ntotal == 9
    assert len(list(folder.glob("*.faiss"))) == 1


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({"weights_sha256": "2" * 64, "encoder": "b"}, "encoder a .1111.* not b .2222"),
        ({"chunk_length": 128}, "was made with chunk length 64, not 128; use the run's own"),
        ({"passages_sha256": "3" * 64}, "passages sha256 None, not 333333333333"),
    ],
)
def test_an_index_of_something_else_is_refused(
    folder: Path, now: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        indexes.load(folder, MADE_OF | now)


def test_an_encoder_that_was_moved_is_the_same(folder: Path) -> None:
    assert indexes.load(folder, MADE_OF | {"encoder": "/elsewhere/a"}).ntotal == 20


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest", "list", "newer"])
def test_an_index_that_is_damaged_is_refused(folder: Path, damage: str) -> None:
    [file] = folder.glob("*.faiss")
    manifest = folder / "manifest.json"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-8])
    elif damage == "gone":
        file.unlink()
    elif damage == "newer":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 9}))
    else:
        manifest.write_text("{" if damage == "manifest" else "[]")
    line = "has format 9" if damage == "newer" else "is damaged .*`make run RUN=...`"
    with pytest.raises(UserError, match=line):
        indexes.load(folder, MADE_OF)


def test_where_there_is_none_the_run_is_to_end_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no index; let the run finish"):
        indexes.load(tmp_path, MADE_OF)


def test_an_index_that_cannot_be_written_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(indexes, "describe", full)
    with pytest.raises(RunFailed, match="cannot be written: No space left on device"):
        indexes.publish(folder, indexes.build(random_vectors(9, 5), IndexSettings()), MADE_OF, FLAT)
    assert indexes.load(folder, MADE_OF).ntotal == 20


def test_a_wrong_setting_is_one_line() -> None:
    with pytest.raises(UserError, match=r"index\.hnsw_links: 1 is not between 2 and 4096"):
        IndexSettings(hnsw_links=1)
