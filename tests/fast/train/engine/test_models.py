"""Models: the presets' sizes, the same weights from the same seed, fp32 whatever was stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from runfolder.errors import UserError
from train import tinyllama
from train.engine import models, tokenization
from train.engine.data import SAMPLES, pieces
from train.engine.once import staged_path
from train.engine.presets import PRESETS, Preset
from train.engine.settings import ModelSettings


def build(config: tinyllama.Config, seed: int = 1) -> PreTrainedModel:
    assert config.staged is not None
    return models.build(config, staged_path(config.staged.tokenizer), seed)


def on_meta(config: tinyllama.Config, preset: str) -> PreTrainedModel:
    """Return a preset's model without memory for its weights."""
    assert config.staged is not None
    chosen = replace(config, model=ModelSettings(preset=preset))
    return models.plan(chosen, staged_path(config.staged.tokenizer), 1)[0]


def formula(preset: Preset) -> int:
    """Return the number of parameters of a Llama of this shape, counted by its matrices."""
    hidden = preset.hidden_size
    keys = hidden * preset.num_key_value_heads // preset.num_attention_heads
    attention = hidden * (hidden + keys + keys + hidden)
    feed_forward = 3 * hidden * preset.intermediate_size
    norms = 2 * hidden
    embeddings = preset.vocab_size * hidden * (1 if preset.tie_word_embeddings else 2)
    return embeddings + preset.num_hidden_layers * (attention + feed_forward + norms) + hidden


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("tiny", 158_016),
        ("15m", 15_191_712),
        ("110m", 109_529_856),
        ("tinyllama-1.1b", 1_100_048_384),
    ],
)
def test_a_preset_has_the_parameters_that_its_name_says(
    config: tinyllama.Config, preset: str, parameters: int
) -> None:
    assert formula(PRESETS[preset]) == parameters
    assert sum(p.numel() for p in on_meta(config, preset).parameters()) == parameters


def test_flops_per_token_of_tinyllama_are_the_known_figure(config: tinyllama.Config) -> None:
    tinyllama_1b = on_meta(config, "tinyllama-1.1b")
    # 6 x (1,100,048,384 - 32,000 x 2,048) + 12 x 22 x 2,048 x 2,048
    assert models.flops_per_token(tinyllama_1b, 2048) == 7_314_370_560
    # Half the context halves the attention's share alone.
    assert models.flops_per_token(tinyllama_1b, 1024) == 7_314_370_560 - 12 * 22 * 2048 * 1024


def test_tied_embeddings_multiply_once_and_count_once(config: tinyllama.Config) -> None:
    shape = PRESETS["15m"]
    expected = 6 * formula(shape) + 12 * shape.num_hidden_layers * shape.hidden_size * 256
    assert models.flops_per_token(on_meta(config, "15m"), 256) == expected


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    config: tinyllama.Config,
) -> None:
    one, same, other = build(config, 1), build(config, 1), build(config, 2)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name]), name
        assert weight.ndim < 2 or not torch.equal(weight, other.state_dict()[name]), name


def test_the_weights_do_not_depend_on_what_was_drawn_before(config: tinyllama.Config) -> None:
    one = build(config, 1)
    torch.rand(7)
    same = build(config, 1)
    assert all(map(torch.equal, one.parameters(), same.parameters()))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_a_folders_weights_are_fp32_in_memory_in_whatever_precision_they_are_stored(
    make_config: Callable[..., tinyllama.Config],
    tied_model_folder: Path,
    tmp_path: Path,
    stored: torch.dtype,
) -> None:
    for file in tied_model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    original = LlamaForCausalLM.from_pretrained(tied_model_folder, dtype=stored)
    original.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in on_disk.values()} == {stored}
    settings = ["--model.preset", "null", "--model.name", str(tmp_path)]
    built = build(make_config(*settings, "--data.sequence_length", "32"))
    assert {p.dtype for p in built.parameters()} == {torch.float32}
    found = dict(built.named_parameters())
    assert found.keys() == on_disk.keys()
    for name, weight in on_disk.items():
        assert torch.equal(found[name], weight.float()), name


def test_weights_that_come_in_another_precision_all_the_same_are_an_error(
    config: tinyllama.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_config = models.AutoModelForCausalLM.from_config
    monkeypatch.setattr(
        models.AutoModelForCausalLM,
        "from_config",
        lambda shape, dtype: from_config(shape, dtype=dtype).bfloat16(),
    )
    with pytest.raises(AssertionError):
        build(config)


def test_the_vocabulary_grows_with_the_tokenizer(
    make_config: Callable[..., tinyllama.Config], tmp_path: Path
) -> None:
    assert build(make_config()).config.vocab_size == 512
    text = pieces([SAMPLES / "train.txt"], text_column="text", join_rows=False)
    tokenization.train(text, 600, tmp_path, "the sample")
    grown = build(make_config("--model.tokenizer", str(tmp_path)))
    assert grown.config.vocab_size == 600
    assert grown.get_input_embeddings().weight.shape[0] == 600


@pytest.mark.filterwarnings("error")
def test_the_layers_are_found_by_whatever_name(config: tinyllama.Config) -> None:
    gpt2 = GPT2Config(vocab_size=50, n_embd=8, n_layer=3, n_head=1)
    distilbert = DistilBertConfig(vocab_size=50, dim=8, n_layers=3, n_heads=2, hidden_dim=8)
    for made, kind in (
        (build(config), "LlamaDecoderLayer"),
        (GPT2LMHeadModel(gpt2), "GPT2Block"),
        (DistilBertModel(distilbert), "TransformerBlock"),
    ):
        found = [type(layer).__name__ for layer in models.layers(made)]
        assert found == [kind] * made.config.num_hidden_layers


def test_gradient_checkpointing_gives_the_same_gradients(config: tinyllama.Config) -> None:
    tokens = torch.arange(20).reshape(1, 20)
    settings = replace(config.model, gradient_checkpointing=True)
    plain, saving = build(config), build(replace(config, model=settings))
    assert saving.is_activation_checkpointing
    for each in (plain, saving):
        each.train()
        each(input_ids=tokens, labels=tokens).loss.backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 128), ("model_type", "gpt2"), ("tie_word_embeddings", True)]
)
def test_another_architecture_is_named_with_both_values(
    config: tinyllama.Config, tmp_path: Path, key: str, value: object
) -> None:
    built = build(config)
    built.config.save_pretrained(tmp_path)
    models.check_same_shape(built, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    mine = saved[key]
    (tmp_path / "config.json").write_text(json.dumps(saved | {key: value}))
    with pytest.raises(UserError, match=rf"another model: {key} is {value} there and {mine} here"):
        models.check_same_shape(built, tmp_path)


def test_an_empty_model_has_the_shape_and_no_weights(
    config: tinyllama.Config, tmp_path: Path
) -> None:
    built = build(config)
    built.config.save_pretrained(tmp_path)
    empty = models.empty(tmp_path)
    assert all(p.is_meta and p.dtype == torch.float32 for p in empty.parameters())
    shapes = {name: p.shape for name, p in built.named_parameters()}
    assert {name: p.shape for name, p in empty.named_parameters()} == shapes
