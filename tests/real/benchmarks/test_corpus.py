"""benchmarks/corpus.py, run for real on small corpora."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import pytest

from benchmarks import corpus

pytestmark = pytest.mark.computes(1)

# Both corpora are large enough that the tokenizer's buffers are full, so that only what grows with
# the corpus differs.
SMALL_MB, FACTOR = 4, 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the record of a run."""
    folder = tmp_path_factory.mktemp("results")
    small = f"--size_mb={SMALL_MB} --factor={FACTOR} --formats=txt "
    small += "--far_block=2000 --skip_batches=200 --repeats=2"
    assert corpus.main([*small.split(), f"--results={folder}"]) == 0
    return (folder / "corpus.json").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def packing(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)["memory"]["formats"]["txt"]
    return found


def test_the_record_is_complete(text: str, packing: dict[str, Any]) -> None:
    found = json.loads(text)
    assert {"circumstances", "workload", "memory", "resumption", "seconds"} <= found.keys()
    first, second = packing["runs"]
    assert second["corpus_bytes"] == pytest.approx(FACTOR * first["corpus_bytes"], rel=0.2)
    peaks = [run["peak_memory_mib"] for run in (first, second)]
    assert packing["ratio"] == pytest.approx(peaks[1] / peaks[0], abs=1e-3)
    assert min(peaks) > 20, "no Python with numpy is smaller"
    resumption = found["resumption"]
    for one in (resumption["engine"], *resumption["peers"].values()):
        expected = one["far_seconds"] / one["near_seconds"]
        assert one["ratio"] == pytest.approx(expected, abs=1e-3)
    assert socket.gethostname() not in text
    assert not re.search(r'"[^"]*/(?:home|root|tmp|usr|opt)/', text)


def test_packing_a_larger_corpus_takes_no_more_memory(packing: dict[str, Any]) -> None:
    assert packing["ratio"] < 1.3
    # What held on to the text alone would take 1, to its tokens as Python's numbers 2 or more.
    assert packing["bytes_for_each_byte"] < 0.5
