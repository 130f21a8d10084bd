"""A rank's part of a checkpoint is the file that safetensors itself would write."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from train.engine.durable import describe
from train.engine.shard import save_file


@pytest.mark.parametrize("longer", range(8))
def test_it_has_the_bytes_of_safetensors_own(tmp_path: Path, longer: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        # Of another length each time, as the header is filled up to a multiple of 8.
        f"weight/{'z' * longer}": torch.rand(3, 5, generator=generator),
        "weight/a.é.weight": nn.Parameter(torch.rand(7, generator=generator)),
        "exp_avg/scalar": torch.tensor(2.5),
        "exp_avg_sq/empty": torch.empty(0, 3),
    }
    told = save_file(tensors, tmp_path / "ours")
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert told == describe(tmp_path / "theirs")


def test_a_rank_that_owns_no_parameter_writes_an_empty_file(tmp_path: Path) -> None:
    save_file({}, tmp_path / "shard")
    assert safetensors.torch.load_file(tmp_path / "shard") == {}
