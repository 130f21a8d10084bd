"""What the tests of train/ share: a group of one process, staged samples, a small tied model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.models import write_tied_model
from tests.shared import SHARED
from train import tinyllama
from train.engine import arguments
from train.engine.distributed import init_distributed

TIED_SEQUENCE_LENGTH = 32


@pytest.fixture(scope="module")
def environment(datasets_folder: Path) -> Iterator[None]:
    """Take what a launcher or Sluice set out of the environment, and train on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for key in os.environ:
            if key != SHARED and key.startswith(("SLUICE_", "ACCELERATE_", "FSDP_")):
                patch.delenv(key)
        for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(key, raising=False)
        patch.setenv("SLUICE_DEVICE", "cpu")
        patch.setenv("SLUICE_DATASETS", str(datasets_folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def device(environment: None) -> Iterator[torch.device]:
    """Return the device of a process group of one, which is there for the module's tests."""
    # The models are small: more threads would only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield init_distributed()
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def make_config(environment: None) -> Callable[..., tinyllama.Config]:
    """Return a function that gives a dry run's settings, staged, with those of a command line."""

    def make(*words: str) -> tinyllama.Config:
        config = arguments.parse(
            tinyllama.Config,
            ["--dry_run", "--export", "false", *words],
            prog="test",
            dry_run=tinyllama.DRY_RUN,
        )
        return tinyllama.stage(config, online=False)

    return make


@pytest.fixture(scope="module")
def config(make_config: Callable[..., tinyllama.Config]) -> tinyllama.Config:
    """Return a dry run's settings: the preset `tiny` on the embedded sample."""
    return make_config()


@pytest.fixture(scope="session")
def tied_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small model with tied embeddings, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    return write_tied_model(
        folder,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TIED_SEQUENCE_LENGTH,
    )
