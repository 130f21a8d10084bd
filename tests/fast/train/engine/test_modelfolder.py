"""modelfolder.py: whether a model folder is whole, told by its headers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from runfolder.errors import UserError
from train.engine import modelfolder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a config.json and one file of weights."""
    (tmp_path / "config.json").write_text('{"vocab_size": 8, "num_hidden_layers": 1}')
    tensors: dict[str, np.ndarray] = {"a": np.ones((3, 5), np.float32), "b": np.ones(7, np.float16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def shard(model: Path) -> None:
    """Name the weights in an index, as a model of several files does."""
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-1.safetensors"}
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def refusal(model: Path) -> str:
    with pytest.raises(UserError) as raised:
        modelfolder.check_whole(model)
    assert str(raised.value).startswith(f"model.name: {model}")
    return str(raised.value)


def test_a_whole_model_passes_in_one_file_or_several(model: Path) -> None:
    modelfolder.check_whole(model)
    shard(model)
    modelfolder.check_whole(model)


def test_a_model_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "convert its weights" in refusal(model)


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
def test_weights_that_are_cut_short_anywhere_are_refused(model: Path, kept: int) -> None:
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:kept])
    assert "download the model again" in refusal(model)


def test_one_part_of_several_without_the_index_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(model)


@pytest.mark.parametrize("offsets", ["[]", "[0]", '["a", "b"]', "{}", "null"])
def test_a_header_of_another_form_is_refused(model: Path, offsets: str) -> None:
    header = f'{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": {offsets}}}}}'.encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "is not a safetensors file; download the model again" in refusal(model)


def test_a_pointer_of_git_lfs_is_called_by_its_name(model: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4400216536\n"
    (model / "model.safetensors").write_text(pointer)
    assert "is a Git LFS pointer, not the weights" in refusal(model)


def test_a_file_that_the_index_names_and_the_folder_lacks_is_refused(model: Path) -> None:
    shard(model)
    (model / "model-1.safetensors").unlink()
    assert "model-1.safetensors is missing" in refusal(model)
    (model / "model.safetensors.index.json").write_text("{}")
    assert "index.json is damaged" in refusal(model)
