"""What labs that know one strategy say to another, while a run is resolved."""

from __future__ import annotations

from types import ModuleType

import pytest

from runfolder.errors import UserError
from train.engine import arguments
from train.labs import ag_news, rag
from train.labs.imdb import script


@pytest.mark.parametrize("lab", [ag_news, script, rag], ids=lambda lab: lab.__name__)
def test_another_strategy_than_ddp_is_refused_before_anything_is_staged(
    environment: None, monkeypatch: pytest.MonkeyPatch, lab: ModuleType
) -> None:
    config = arguments.parse(lab.Config, ["--dry_run"], prog="test", dry_run=lab.DRY_RUN)
    monkeypatch.setenv("SLUICE_ACCEL", "zero2")
    with pytest.raises(UserError, match=r"ACCEL=zero2: the lab \w+ runs under ddp only; leave"):
        lab.stage(config, online=False)
    monkeypatch.setenv("SLUICE_ACCEL", "ddp")
    assert lab.stage(config, online=False).staged is not None
