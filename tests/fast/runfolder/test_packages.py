"""runfolder/packages.py: which packages of the user's own there are, and whether they changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from runfolder import packages


def test_those_that_were_recorded_at_the_installation_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert packages.installed() == {}
    (tmp_path / "share").mkdir()
    (tmp_path / "share/extra.txt").write_text("trl==1.16.0\neinops==0.8.2\n")
    assert packages.installed() == {"trl": "1.16.0", "einops": "0.8.2"}


def test_each_difference_is_named(tmp_path: Path) -> None:
    # A run from before there were any.
    (tmp_path / "run.json").write_text("{}")
    assert packages.changed(tmp_path, {}, "now") == ""
    began = {"trl": "1.16.0", "einops": "0.8.2", "gone": "1"}
    (tmp_path / "run.json").write_text(json.dumps({"extra_packages": began}))
    assert packages.changed(tmp_path, dict(reversed(began.items())), "now") == ""
    now = {"trl": "1.17.0", "einops": "0.8.2", "new": "2"}
    assert packages.changed(tmp_path, now, "in x.sif") == (
        "the extra packages in x.sif are not those that the run began with: gone was 1 and is "
        "absent, new was absent and is 2, trl was 1.16.0 and is 1.17.0; continue it in the image "
        "or .venv that it began in, or put these versions there (EXTRA=)"
    )
