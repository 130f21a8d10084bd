"""rehearsal.py and model.py: a model folder gives the weights that it holds, or is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5Model,
)

from runfolder.errors import UserError
from train.engine import modelfolder, models
from train.engine.pretrained import ENCODER, LANGUAGE_MODEL
from train.engine.rehearsal import rehearse
from train.engine.shape import read_shape

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
Weights = dict[str, torch.Tensor]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path / "llama")


def write(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder: Path, kind: str = LANGUAGE_MODEL, *, when_loaded: bool = False) -> str:
    with pytest.raises(UserError) as raised:
        models.from_folder(folder, kind) if when_loaded else rehearse(folder, kind)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("when_loaded", [False, True])
def test_weights_that_the_files_lack_are_named_and_never_random(
    llama: Path, when_loaded: bool
) -> None:
    change_config(llama, num_hidden_layers=3)
    said = refusal(llama, when_loaded=when_loaded)
    assert "lack 9 weights" in said and "model.layers.2.input_layernorm.weight" in said
    change_config(llama, num_hidden_layers=2)
    change_weights(llama, lambda w: {f"_orig_mod.{name}": v for name, v in w.items()})
    assert "begin with _orig_mod." in refusal(llama, when_loaded=when_loaded)


@pytest.mark.parametrize("when_loaded", [False, True])
def test_weights_of_another_shape_are_named(llama: Path, when_loaded: bool) -> None:
    change_config(llama, intermediate_size=32)
    said = refusal(llama, when_loaded=when_loaded)
    assert "mlp.down_proj.weight has shape (16, 24) in the file, but (16, 32) by" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(llama: Path, value: float) -> None:
    def spoil(weights: Weights) -> Weights:
        weights["model.norm.weight"][3] = value
        return weights

    change_weights(llama, spoil)
    assert "model.norm.weight holds values that are not finite" in refusal(llama)


def test_weights_that_config_has_no_use_for_are_said(llama: Path) -> None:
    assert rehearse(llama, LANGUAGE_MODEL)["notes"] == []
    change_config(llama, num_hidden_layers=1)
    (note,) = rehearse(llama, LANGUAGE_MODEL)["notes"]
    assert "ignored 9 weights that are not used (model.layers.1.input_layernorm.weight," in note


def test_an_encoder_lacks_its_pooler_and_brings_a_head_of_its_own(tmp_path: Path) -> None:
    folder = write(BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)), tmp_path / "lm")
    change_config(folder, is_decoder=False)
    (note,) = rehearse(folder, ENCODER)["notes"]
    assert "cls.predictions" in note and "of a head that is not used" in note
    change_weights(folder, lambda w: {k: v for k, v in w.items() if ".layer.1.output" not in k})
    assert "encoder.layer.1.output" in refusal(folder, ENCODER)


def test_a_language_model_must_not_look_ahead_and_an_encoder_must(tmp_path: Path) -> None:
    torch.manual_seed(3)
    bert = write(BertLMHeadModel(BertConfig(**SMALL)), tmp_path / "bert")
    assert "attends in both directions" in refusal(bert)
    assert models.from_folder(bert, ENCODER).config.model_type == "bert"
    change_config(bert, is_decoder=True)
    assert models.from_folder(bert).config.is_decoder
    gpt2 = write(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2)), tmp_path / "gpt2")
    assert "is a causal model" in refusal(gpt2, ENCODER)


def test_the_shape_is_that_of_the_model_by_the_names_that_most_use(tmp_path: Path) -> None:
    neo = GPTNeoConfig(
        vocab_size=50,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
    )
    shape = rehearse(write(GPTNeoForCausalLM(neo), tmp_path / "neo"), LANGUAGE_MODEL)
    assert [shape[k] for k in ("vocab_size", "num_hidden_layers", "max_position_embeddings")] == [
        50,
        2,
        32,
    ]
    gpt2 = GPT2Config(vocab_size=60, n_embd=16, n_layer=3, n_head=2, n_positions=48)
    shape = rehearse(write(GPT2LMHeadModel(gpt2), tmp_path / "gpt2"), LANGUAGE_MODEL)
    assert [shape[k] for k in ("vocab_size", "num_hidden_layers", "max_position_embeddings")] == [
        60,
        3,
        48,
    ]


def test_it_is_asked_once_wherever_the_folder_is_copied_and_again_when_it_changes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = tmp_path / "datasets"
    monkeypatch.setenv("SLUICE_DATASETS", str(datasets))
    asked: list[str] = []

    def count(folder: Path, kind: str) -> dict[str, Any]:
        asked.append(kind)
        return {"vocab_size": len(asked)}

    monkeypatch.setattr("train.engine.rehearsal.rehearse", count)

    def ask(folder: Path, kind: str) -> int:
        return int(read_shape(folder, kind)["vocab_size"])

    assert [ask(llama, LANGUAGE_MODEL) for _ in range(2)] == [1, 1]
    assert ask(llama, ENCODER) == 2
    # As on a node: mounted elsewhere, of another time, and not to be written.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(llama, elsewhere, copy_function=shutil.copyfile)
    monkeypatch.setenv("SLUICE_DATASETS", str(shutil.copytree(datasets, tmp_path / "node")))
    assert ask(elsewhere, LANGUAGE_MODEL) == 1
    # A file is in the way of the folder: nothing can be written there, not even by root.
    (tmp_path / "full").touch()
    monkeypatch.setenv("SLUICE_DATASETS", str(tmp_path / "full"))
    assert [ask(elsewhere, LANGUAGE_MODEL) for _ in range(2)] == [3, 4]
    monkeypatch.setenv("SLUICE_DATASETS", str(datasets))
    change_config(llama, hidden_act="gelu")
    assert ask(llama, LANGUAGE_MODEL) == 5


def test_a_head_of_the_files_own_is_kept_although_config_ties_it(
    llama: Path, tmp_path: Path
) -> None:
    change_config(llama, tie_word_embeddings=True)
    (note,) = rehearse(llama, LANGUAGE_MODEL)["notes"]
    assert "the files have a separate head" in note
    loaded = models.from_folder(llama)
    assert loaded.config.tie_word_embeddings is False
    held = load_file(llama / "model.safetensors")
    head = loaded.get_output_embeddings()
    assert torch.equal(head.weight, held["lm_head.weight"])
    assert not torch.equal(head.weight, held["model.embed_tokens.weight"])
    loaded.save_pretrained(tmp_path / "again")
    assert "lm_head.weight" in load_file(tmp_path / "again/model.safetensors")


def test_adapters_are_no_model(llama: Path) -> None:
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds adapters .adapter_config.json. beside a model"):
        modelfolder.check_whole(llama)
    (llama / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds adapters .LoRA., not the model"):
        modelfolder.check_whole(llama)


def test_what_is_no_model_for_this_is_one_line_with_the_next_step(
    llama: Path, tmp_path: Path
) -> None:
    text = json.loads((llama / "config.json").read_text())
    for values, said in (
        ({"model_type": "llama9"}, "does not know model_type 'llama9'"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "weights are quantized and cannot be trained; give the original model",
        ),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}},
            "needs custom code (trust_remote_code), which is not run here",
        ),
        ({"model_type": "gemma3", "text_config": text}, "gemma3 takes more than text; save"),
    ):
        (llama / "config.json").write_text(json.dumps(text))
        change_config(llama, **values)
        assert said in refusal(llama), values
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    t5_folder = write(T5Model(t5), tmp_path / "t5")
    for kind in (LANGUAGE_MODEL, ENCODER):
        assert "t5 is an encoder-decoder model" in refusal(t5_folder, kind)
    bert = write(BertModel(BertConfig(**SMALL)), tmp_path / "bert")
    change_config(bert, model_type="vit")
    assert "vit is not a causal language model" in refusal(bert)
