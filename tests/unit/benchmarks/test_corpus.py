"""benchmarks/corpus.py, run for real on small corpora."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest

from benchmarks import corpus
from train.engine.errors import RunFailed

# Where both corpora are large enough that the tokenizer's buffers are full, so that only what
# grows with the corpus differs.
SMALL_MB, LARGE_MB = 6, 24


@pytest.mark.slow
def test_the_record_is_complete(tmp_path: Path) -> None:
    small = "--size_mb=0.2 --factor=2 --far_block=2000 --skip_batches=200 --repeats=2"
    assert corpus.main([*small.split(), f"--results={tmp_path}"]) == 0
    text = (tmp_path / "corpus.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert {"circumstances", "workload", "memory", "resumption", "seconds"} <= found.keys()
    for suffix in ("txt", "jsonl"):
        one = found["memory"]["formats"][suffix]
        first, second = one["runs"]
        assert second["corpus_bytes"] == pytest.approx(2 * first["corpus_bytes"], rel=0.2)
        peaks = [run["peak_memory_mib"] for run in (first, second)]
        assert one["ratio"] == pytest.approx(peaks[1] / peaks[0], abs=1e-3)
        assert min(peaks) > 20, "no Python with numpy is smaller"
    resumption = found["resumption"]
    for one in (resumption["engine"], *resumption["peers"].values()):
        expected = one["far_seconds"] / one["near_seconds"]
        assert one["ratio"] == pytest.approx(expected, rel=0.01)
    assert socket.gethostname() not in text
    assert not re.search(r'"[^"]*/(?:home|root|tmp|usr|opt)/', text)


@pytest.mark.slow
def test_packing_a_larger_corpus_takes_no_more_memory(tmp_path: Path) -> None:
    config = corpus.Config(size_mb=SMALL_MB, factor=LARGE_MB // SMALL_MB, formats="txt")
    found = corpus.measure_packing(config, tmp_path)["formats"]["txt"]
    assert found["ratio"] < 1.3
    # What held on to the text alone would take 1, to its tokens as Python's numbers 2 or more.
    assert found["bytes_for_each_byte"] < 0.8


def test_a_leak_would_show(tmp_path: Path) -> None:
    words = corpus._vocabulary(seed=1)
    hold = "import sys; held = [line for line in open(sys.argv[1])]"
    runs = []
    for size_mb in (1, 20):
        path = tmp_path / f"{size_mb}.txt"
        num_bytes = corpus.write_corpus(path, size_mb * 1_000_000, words, seed=1)
        report = corpus.peak_memory([sys.executable, "-c", hold, str(path)], dict(os.environ))
        runs.append({"corpus_bytes": num_bytes, "peak_memory_mib": report["peak_bytes"] / 2**20})
    found = corpus.compare_memory(*runs)
    assert found["ratio"] > 1.3
    assert found["bytes_for_each_byte"] > 1


def test_a_peak_is_the_command_s_own_not_that_of_the_process_which_asks() -> None:
    mine = bytearray(400_000_000)
    report = corpus.peak_memory([sys.executable, "-I", "-S", "-c", "pass"], dict(os.environ))
    assert report["peak_bytes"] < 100_000_000 < len(mine)


def test_a_command_that_fails_is_no_measurement() -> None:
    with pytest.raises(RunFailed, match="boom"):
        corpus.peak_memory([sys.executable, "-c", "raise SystemExit('boom')"], dict(os.environ))


def test_a_corpus_has_the_size_that_was_asked_for(tmp_path: Path) -> None:
    words = corpus._vocabulary(seed=1)
    for suffix in ("txt", "jsonl"):
        path = tmp_path / f"corpus.{suffix}"
        num_bytes = corpus.write_corpus(path, 300_000, words, seed=1)
        assert num_bytes == path.stat().st_size == pytest.approx(300_000, rel=0.1)
