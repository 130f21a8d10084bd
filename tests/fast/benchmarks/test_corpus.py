"""benchmarks/corpus.py: its corpora and its measure; tests/real/benchmarks runs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks import corpus
from train.engine.errors import RunFailed


def test_a_leak_would_show(tmp_path: Path) -> None:
    hold = "import sys; held = [line for line in open(sys.argv[1])]"
    runs = []
    for size_mb in (1, 6):
        path = tmp_path / f"{size_mb}.txt"
        num_bytes = path.write_text("a line of a corpus\n" * (size_mb * 50_000))
        report = corpus.peak_memory([sys.executable, "-c", hold, str(path)], dict(os.environ))
        runs.append({"corpus_bytes": num_bytes, "peak_memory_mib": report["peak_bytes"] / 2**20})
    found = corpus.compare_memory(*runs)
    assert found["ratio"] > 1.3
    assert found["bytes_for_each_byte"] > 1


def test_a_peak_is_the_command_s_own_not_that_of_the_process_which_asks() -> None:
    mine = bytearray(150_000_000)
    report = corpus.peak_memory([sys.executable, "-I", "-S", "-c", "pass"], dict(os.environ))
    assert report["peak_bytes"] < 100_000_000 < len(mine)


def test_a_command_that_fails_is_no_measurement() -> None:
    with pytest.raises(RunFailed, match="boom"):
        corpus.peak_memory([sys.executable, "-c", "raise SystemExit('boom')"], dict(os.environ))


def test_a_corpus_has_the_size_that_was_asked_for(tmp_path: Path) -> None:
    words = corpus.vocabulary(seed=1)
    for suffix in ("txt", "jsonl"):
        path = tmp_path / f"corpus.{suffix}"
        num_bytes = corpus.write_corpus(path, 300_000, words, seed=1)
        assert num_bytes == path.stat().st_size == pytest.approx(300_000, rel=0.1)
