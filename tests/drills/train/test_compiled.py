"""Layers that torch compiles to C++, which takes half a minute; the gate leaves that out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ranks
from tests.conftest import losses
from tests.real.train.test_trajectories import CONSTANT, TOLERANCE


@pytest.mark.needs("c++")
@pytest.mark.computes(2)
def test_compiled_layers_give_the_same_curve(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    environment = clean_environment | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    for name, words in (("eager", []), ("compiled", ["--compile"])):
        words = [*CONSTANT, "--max_steps", "4", "--run_folder", str(tmp_path / name), *words]
        done = ranks.run("ddp", 1, "train.tinyllama", *words, environment=environment)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=TOLERANCE)
    assert list((tmp_path / "inductor").rglob("*.so")), "nothing was compiled"
