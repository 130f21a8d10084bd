"""Weights that are read where a model is split: the same as transformers loads."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from runfolder.errors import UserError
from tests import ranks
from tests.models import SHAPE
from train.engine import models, source
from train.engine.models import _of_folder, from_folder, hollow

CPU = torch.device("cpu")


def write(folder: Path, family: str, *, shards: str = "5GB", **more: Any) -> Path:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SHAPE, **more})
    model = AutoModelForCausalLM.from_config(config, dtype=more.get("dtype", torch.float32))
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    mine, its = model.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    for name in mine:
        assert torch.equal(mine[name], its[name]), name
        assert mine[name].dtype == its[name].dtype
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)
    assert model.generation_config.to_dict() == other.generation_config.to_dict()
    assert model.config.to_dict() == other.config.to_dict()


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"dtype": torch.bfloat16}),
        ("llama", {"shards": "20KB"}),
        ("qwen2", {"tie_word_embeddings": True, "layer_types": ["full_attention"] * 2}),
        ("mistral", {}),
        ("qwen3", {"head_dim": 8}),
        ("phi3", {"pad_token_id": 0}),
        ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),
        ("olmo2", {"pad_token_id": 0, "eos_token_id": 2}),
    ],
)
def test_a_folder_gives_what_transformers_loads(
    tmp_path: Path, family: str, more: dict[str, Any]
) -> None:
    folder = write(tmp_path / "model", family, **more)
    GenerationConfig(do_sample=True, top_k=7, eos_token_id=[1, 2]).save_pretrained(folder)
    model, weights = _of_folder(folder)
    assert weights is not None and all(p.is_meta for p in model.parameters())
    source.place_whole(model, weights, CPU)
    assert_same(model, from_folder(folder))


def test_what_transformers_converts_or_decides_is_left_to_it(tmp_path: Path) -> None:
    # It merges experts, and drops the prefix that the files lack.
    for family, more in (("mixtral", {"num_local_experts": 2}), ("gpt2", {})):
        folder = write(tmp_path / family, family, **more)
        if family == "gpt2":
            file = folder / "model.safetensors"
            bare = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
            save_file(bare, file, metadata={"format": "pt"})
        model, weights = _of_folder(folder)
        assert weights is None
        assert_same(model, from_folder(folder))
    # A head of its own beside a config.json that ties it.
    folder = write(tmp_path / "tied", "llama", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.ones(300, 32)}, file, {"format": "pt"})
    model, weights = _of_folder(folder)
    assert weights is None
    assert torch.equal(model.lm_head.weight, torch.ones(300, 32))


def test_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama")
    model, weights = _of_folder(folder)
    assert weights is not None
    for each in (weights, source.of_seed(model, 3)):
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            whole = each.read(name, source.ALL)
            assert torch.equal(each.read(name, slice(3, 11)), whole[3:11])
            end = len(whole)
            assert each.read(name, slice(end, end)).shape == (0, *whole.shape[1:])


def test_a_seed_draws_as_transformers_does_and_by_name(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["llama"](**{**SHAPE, "vocab_size": 4000})
    model = hollow(config)
    drawn = source.of_seed(model, 1)
    source.place_whole(model, drawn, CPU)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert float(tensor.std(correction=0)) == pytest.approx(
            float(theirs[name].std(correction=0)), rel=0.1
        )
        assert float(tensor.mean()) == pytest.approx(float(theirs[name].mean()), abs=0.002)
    name = "model.layers.0.self_attn.q_proj.weight"
    other = source.of_seed(model, 2)
    assert not torch.equal(drawn.read(name, source.ALL), other.read(name, source.ALL))
    assert drawn.identity != other.identity
    # Of two layers of one shape, each has its own.
    twin = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(drawn.read(name, source.ALL), drawn.read(twin, source.ALL))


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    model, found = _of_folder(folder)
    assert found is not None
    with pytest.raises(UserError, match=r"model\.norm\.weight holds values that are not finite"):
        source.place_whole(model, found, CPU)


def test_a_model_that_looks_ahead_is_found_without_its_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "bert", pad_token_id=0)
    with pytest.raises(UserError, match="attends in both directions"):
        _of_folder(folder)


def test_ranks_that_read_other_weights_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = _of_folder(write(tmp_path / "mine", "llama"))[1]
    same = _of_folder(write(tmp_path / "same", "llama", shards="20KB"))[1]
    # A copy that is trained further: files of the same names and sizes.
    file = write(tmp_path / "other", "llama") / "model.safetensors"
    further = {name: tensor * 1.001 for name, tensor in load_file(file).items()}
    save_file(further, file, metadata={"format": "pt"})
    other = _of_folder(tmp_path / "other")[1]
    assert mine and same and other
    for theirs, is_same in ((same, True), (other, False)):
        monkeypatch.setattr(source, "gather_strings", lambda text, t=theirs: [text, t.identity])
        with nullcontext() if is_same else pytest.raises(UserError, match="different weights"):
            source.assert_same(mine)


def test_a_model_whose_config_cannot_have_one_layer_is_loaded_as_a_whole(tmp_path: Path) -> None:
    config = {"state_size": 4, "num_hidden_layers": 2, "vocab_size": 300, "hidden_size": 32}
    folder = tmp_path / "mamba"
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["mamba"](**config)).save_pretrained(folder)
    model, weights = _of_folder(folder)
    assert weights is None
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "more"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("phi", {"pad_token_id": 0})],
)
def test_new_tokens_have_the_rows_that_they_have_in_a_whole_model(
    tmp_path: Path, family: str, more: dict[str, Any]
) -> None:
    folder = write(tmp_path / "model", family, **more)
    whole = from_folder(folder)
    models.add_tokens(whole, 307)
    model, weights = _of_folder(folder)
    assert weights is not None
    longer = models.add_tokens(model, 307, weights)
    assert longer is not None and longer.identity != weights.identity
    source.place_whole(model, longer, CPU)
    assert_same(model, whole)
    name = "model.embed_tokens.weight"
    assert torch.equal(longer.read(name, slice(298, 305)), whole.state_dict()[name][298:305])


def test_a_rank_under_fsdp2_never_holds_the_whole_model(clean_environment: dict[str, str]) -> None:
    shares: dict[str, list[float]] = {}
    for how in ("read", "whole"):
        worker = "tests.fast.train.engine.worker_start"
        done = ranks.run("fsdp2", 2, worker, how, environment=clean_environment)
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        shares[how] = [one["took"] / one["model"] for one in found]
    # Half of it, and the largest tensor; the same with all weights first shows what that is worth.
    assert max(shares["read"]) < 0.8, shares
    assert min(shares["whole"]) > 1, shares
