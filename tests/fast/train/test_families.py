"""Model families of the field, built at a tiny size: what a run makes of each is checked by hand.

One run each, with dropout wherever the family has any and gradient checkpointing: its last loss by
transformers' own, its export by the checkpoint's tensors, and a run that resumes between two
evaluations by the straight one, to the last bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from train import tinyllama
from train.engine.batches import Blocks
from train.engine.once import staged_path

# What makes a model small, by all the names that configs have for it.
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# What a family wants besides.
MORE: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4},
    "codegen": {"rotary_dim": 4},
    "cohere": {"use_qk_norm": True},
    "deepseek_v3": {
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "falcon": {"num_kv_heads": 4},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "mpt": {"n_heads": 4, "d_model": 32, "n_layers": 2, "max_seq_len": 64},
}
FAMILIES = [
    "bloom",
    "codegen",
    "cohere",
    "deepseek_v3",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "mpt",
    "nemotron",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
]
LENGTH = 32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_what_it_is_by_hand(
    family: str,
    device: torch.device,
    make_config: Callable[..., tinyllama.Config],
    tied_model_folder: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / family
    write_model(family, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tied_model_folder / name, folder / name)
    config = make_config(
        *("--model.preset", "null", "--model.name", str(folder)),
        *("--model.gradient_checkpointing", "true"),
        *("--data.sequence_length", str(LENGTH), "--batch.global_batch_size", "4"),
        *("--max_steps", "4", "--log_every_steps", "1", "--schedule.warmup_steps", "1"),
        *("--evaluation.every_steps", "100", "--evaluation.max_tokens", "128"),
        *("--checkpoint.every_steps", "2", "--checkpoint.keep", "2", "--export", "true"),
    )
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert tinyllama.train(config, straight, device, rehearse_stop=False) == "finished"

    # Each run that resumes here does so at step 2, and is evaluated at step 4 only.
    (resumed / "checkpoints").mkdir(parents=True)
    step_2 = straight / "checkpoints/step-00000002"
    shutil.copytree(step_2, resumed / "checkpoints/step-00000002")
    assert tinyllama.train(config, resumed, device, rehearse_stop=False) == "finished"
    expected, found = losses(straight), losses(resumed)
    assert [found[step] for step in (3, 4)] == [expected[step] for step in (3, 4)]

    exported, loading = AutoModelForCausalLM.from_pretrained(
        straight / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    held = tensors(straight / "checkpoints/step-00000004")
    parameters = dict(exported.named_parameters())
    assert held.keys() == parameters.keys()
    assert all(torch.equal(held[name], parameters[name]) for name in held)
    first = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_buffers())
    for name, buffer in exported.named_buffers():
        assert torch.equal(buffer, first[name]), name

    assert config.staged is not None
    inputs, labels = Blocks(staged_path(config.staged.validation), LENGTH).rows([0, 1, 2, 3])
    with torch.no_grad():
        logits = exported(input_ids=torch.from_numpy(inputs)).logits.double()
    chosen = logits.log_softmax(-1).gather(2, torch.from_numpy(labels)[..., None])
    assert last_line(straight)["validation_loss"] == pytest.approx(-float(chosen.mean()), rel=2e-6)


def write_model(family: str, folder: Path) -> None:
    config = CONFIG_MAPPING[family]()
    known = set(config.to_dict()) | set(config.attribute_map)
    wanted = {name: value for name, value in TINY.items() if name in known}
    wanted |= {
        name: 0.1
        for name, value in config.to_dict().items()
        if ("dropout" in name or "pdrop" in name) and isinstance(value, int | float)
    }
    # By its constructor, which checks what belongs together and counts the layers.
    config = CONFIG_MAPPING[family](**(wanted | MORE.get(family, {})))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name in model.state_dict().keys() - dict(model.named_parameters()).keys():
        if name in dict(model.named_buffers()):
            # Not the zeros that an export would have of itself.
            model.get_buffer(name).normal_()
    model.save_pretrained(folder)


def lines(run_folder: Path) -> list[dict[str, Any]]:
    text = (run_folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def last_line(run_folder: Path) -> dict[str, Any]:
    return lines(run_folder)[-1]


def losses(run_folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(run_folder) if "loss" in line}


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, read by the library alone."""
    (shard,) = checkpoint.glob("shard-*.safetensors")
    with safe_open(shard, framework="pt") as file:
        return {
            key.removeprefix("weight/"): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
            if key.startswith("weight/")
        }
