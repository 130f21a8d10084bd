"""What labs that know one strategy say to another, while a run is resolved."""

from __future__ import annotations

import importlib

import pytest

from runfolder.errors import UserError
from train.engine import arguments


@pytest.mark.parametrize("name", ["ag_news", "imdb", "rag"])
def test_another_strategy_than_ddp_is_refused_before_anything_is_staged(
    environment: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lab = importlib.import_module(f"train.labs.{name}.script")
    config = arguments.parse(lab.Config, ["--dry_run"], prog="test", dry_run=lab.DRY_RUN)
    monkeypatch.setenv("SLUICE_ACCEL", "zero2")
    with pytest.raises(UserError, match=r"ACCEL=zero2: the lab \w+ runs under ddp only; leave"):
        lab.stage(config, online=False)
    monkeypatch.setenv("SLUICE_ACCEL", "ddp")
    assert lab.stage(config, online=False).staged is not None
