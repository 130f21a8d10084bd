"""runfolder/settings.py: new settings count once the run has taken them."""

from __future__ import annotations

from pathlib import Path

import pytest

from runfolder import settings


@pytest.mark.parametrize("refused", [True, False])
def test_those_of_before_come_back_where_the_new_ones_are_refused(
    tmp_path: Path, refused: bool
) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    # Of a start that was killed before it could settle it.
    (tmp_path / "config.before.yaml").write_text("a: 0\n")
    settings.replace(tmp_path, "a: 2\n")
    assert (tmp_path / "config.yaml").read_text() == "a: 2\n"
    settings.settle(tmp_path, refused=refused)
    assert (tmp_path / "config.yaml").read_text() == ("a: 1\n" if refused else "a: 2\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_run_that_was_never_continued_has_none_to_put_back(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    settings.settle(tmp_path, refused=True)
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"
