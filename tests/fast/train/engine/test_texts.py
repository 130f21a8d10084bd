"""texts.py: a comparison of large texts ends soon, and says how far it went."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from train.engine import overlap, texts
from train.engine.data import from_rows
from train.engine.texts import Source

ROWS = [f"This is row number {n:04} of a text." for n in range(100)]


def source(name: str, *files: list[str]) -> Source:
    parts = [partial(from_rows, rows, join_rows=False) for rows in files]
    return Source(name=name, made_of=[name, files], parts=list(parts), is_local=False)


@pytest.mark.parametrize(("rows", "share"), [(200, "all"), (20, "50.0%")])
def test_of_a_large_training_text_a_part_is_compared_and_that_is_said_each_time(
    environment: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: int,
    share: str,
) -> None:
    limit = rows * len(ROWS[0])
    monkeypatch.setattr(overlap, "MAX_CHARACTERS", limit)
    monkeypatch.setenv("SLUICE_DATASETS", str(tmp_path))
    other = [row.upper() for row in ROWS]
    # One row that measures is at the beginning of a file, the other at the end of one.
    sources = {
        "train": source("train", ROWS, other),
        "validation": source("validation", [ROWS[5], other[95]]),
    }
    for _ in range(2):
        texts.say_overlap(sources, online=True)
        said = capsys.readouterr().out
        assert f"data.validation: {share} of its text" in said
        assert (f"is compared with only {limit:,} characters" in said) is (rows == 20)
