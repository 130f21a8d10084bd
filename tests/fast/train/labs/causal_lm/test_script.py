"""Lab 2: what is refused, what LoRA trains and leaves alone, and that a stop changes nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from runfolder.checkpoints import published
from runfolder.errors import UserError
from tests.conftest import read_metrics
from train import export, generate
from train.engine import arguments, checkpoint_reader, signals
from train.engine.batches import Blocks
from train.engine.once import staged_path
from train.engine.strategy.base import STATES
from train.labs.causal_lm import script
from train.labs.causal_lm.settings import Config

Make = Callable[..., Config]
SHORT = ("--max_steps", "6", "--evaluation.every_steps", "3", "--checkpoint.every_steps", "3")


@pytest.fixture(scope="module")
def make(environment: None, tied_model_folder: Path) -> Make:
    """Return a function that gives a dry run's settings, staged, of a model folder (tied, fp32)."""

    def parse(*words: str) -> Config:
        model = ("--model.preset", "null", "--model.name", str(tied_model_folder))
        return arguments.parse(
            Config,
            ["--dry_run", *model, "--data.sequence_length", "24", *SHORT, *words],
            prog="test",
            dry_run=script.DRY_RUN,
        )

    return lambda *words: script.stage(parse(*words), online=False)


@pytest.fixture(autouse=True)
def no_signal() -> Iterator[None]:
    yield
    signals.forget_rehearsal()


def run(config: Config, folder: Path, device: torch.device, *, stop: bool = False) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(arguments.to_yaml(config))
    return script.train(config, folder, device, rehearse_stop=stop)


@pytest.fixture(scope="module")
def adapted(make: Make, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with LoRA, not stopped; not to be changed."""
    folder = tmp_path_factory.mktemp("adapted")
    assert run(make("--method", "lora"), folder, device) == "finished"
    return folder


# ---- what is refused ----

WRONG = [
    ("--method full --lora.rank 4", "lora: is only used with method lora; add --method lora"),
    ("--method qlora", "--method: 'qlora' is not one of full, lora"),
    ("--method lora --lora.rank 0", "--lora.rank: 0 is not positive"),
    ("--method lora --lora.rank 17", "lora.rank: 17 is more than 16, the smaller side of k_proj"),
    ("--method lora --lora.alpha 0", "--lora.alpha: 0.0 is not a positive number"),
    ("--method lora --lora.alpha nan", "--lora.alpha: 'nan' is not a number"),
    ("--method lora --lora.dropout 1", "--lora.dropout: 1.0 is not in [0, 1)"),
    (
        "--method lora --lora.target_modules q_proj,query",
        "has no layer 'query'; it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, "
        "v_proj (or all-linear)",
    ),
    ("--method lora --lora.target_modules lm_head", "has no layer 'lm_head'"),
    ("--lora.target_modules q_proj,", "lora.target_modules: 'q_proj,' contains an empty name"),
    ("--lora.ranks 4", "--lora.ranks is not a setting; did you mean 'lora.rank'?"),
    ("--dry_run false --method lora --model.preset tiny", "model.preset: tiny has random weights"),
    ("--sample.prompts []", "sample.prompts: one is empty"),
    ('--sample.prompts ["a",""]', "sample.prompts: one is empty"),
    ("--sample.max_new_tokens 0", "sample.max_new_tokens: 0 is not positive"),
    ("--sample.max_new_tokens 31", "sample.max_new_tokens: 31 and the"),
    ("--sample.temperature -1", "sample.temperature: -1.0 is not 0 or a positive number"),
    ("--data.sequence_length 33", "data.sequence_length: 33 is more than the 32 positions"),
    ("--data.train nowhere.txt --data.validation x.txt", "data.train: nowhere.txt does not exist"),
    ("--data.train nowhere.txt", "data.train: is given without data.validation"),
    ("--model.name nowhere/nothing", "model.name: nowhere/nothing is not staged; run `make fetch`"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[words for words, _ in WRONG])
def test_what_is_wrong_is_one_line_that_says_what_is_there(
    make: Make, words: str, message: str
) -> None:
    with pytest.raises(UserError) as refused:
        make(*words.split())
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_wrong_setting_leaves_no_run_folder(make: Make, tmp_path: Path) -> None:
    wrong = ["--dry_run", "--method", "lora", "--lora.target_modules", "query"]
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="the preset tiny has no layer 'query'"):
        script.SCRIPT.main([*wrong, "--run_folder", str(folder)])
    assert not folder.exists()


def test_a_run_is_not_continued_as_another(make: Make, adapted: Path, device: torch.device) -> None:
    for words, message in (
        (["--method", "lora", "--lora.rank", "4"], "was made with lora.rank 8, not 4"),
        (["--method", "lora", "--lora.alpha", "8"], "was made with lora.alpha 16.0, not 8.0"),
        (["--method", "full"], "was made with method lora, not full"),
    ):
        with pytest.raises(UserError, match=message):
            run(make(*words), adapted, device)


# ---- what LoRA trains ----


def test_only_the_adapters_train_and_only_they_are_saved(
    adapted: Path, tied_model_folder: Path
) -> None:
    newest = published(adapted / "checkpoints")[0]
    _, names = checkpoint_reader.reader(newest)
    # Seven matrices in each of two layers, A and B.
    assert len(names) == 2 * 7 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    files = load_file(newest / "shard-00000-of-00001.safetensors")
    assert {key.partition("/")[0] for key in files} == set(STATES)
    base = load_file(tied_model_folder / "model.safetensors")
    merged = load_file(adapted / "export/model.safetensors")
    assert merged.keys() == base.keys()
    for key, weight in merged.items():
        changed = torch.linalg.matrix_rank(weight - base[key]) if weight.ndim == 2 else None
        if "_proj" in key:
            assert changed is not None and 1 <= changed <= 8, key
        else:
            assert torch.equal(weight, base[key]), key


def test_adapters_beside_the_model_are_the_merged_model(
    adapted: Path, tied_model_folder: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tied_model_folder, dtype=torch.float32)
    beside = peft.PeftModel.from_pretrained(base, str(adapted / "export-adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(adapted / "export", dtype=torch.float32)
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Products are taken in another order: x W + x A B, or x (W + A B).
        torch.testing.assert_close(
            beside(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-5
        )
    described = json.loads((adapted / "export-adapter/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tied_model_folder)
    assert not (adapted / "export-adapter/README.md").exists()


def test_export_by_hand_merges_again(adapted: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert export.main([str(adapted), "--output", str(output), "--dtype", "bfloat16"]) == 0
    assert (tmp_path / "out-adapter/adapter_model.safetensors").is_file()
    again = load_file(output / "model.safetensors")
    for key, weight in load_file(adapted / "export/model.safetensors").items():
        assert torch.equal(again[key], weight.bfloat16()), key
    shutil.rmtree(output)
    with pytest.raises(UserError, match="out-adapter exists; give a new folder"):
        export.main([str(adapted), "--output", str(output)])


def test_named_layers_alone_get_adapters(make: Make, device: torch.device, tmp_path: Path) -> None:
    words = ("--method", "lora", "--lora.target_modules", "q_proj, v_proj", "--lora.dropout", "0.5")
    config = make(*words, "--max_steps", "1", "--export", "false")
    assert run(config, tmp_path, device) == "finished"
    _, names = checkpoint_reader.reader(published(tmp_path / "checkpoints")[0])
    assert len(names) == 2 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in names)


# ---- before and after ----


def test_perplexity_is_of_the_whole_text_and_falls(adapted: Path, make: Make) -> None:
    config = make()
    assert config.staged is not None
    blocks = Blocks(staged_path(config.staged.validation), 24)
    assert blocks.num_all > blocks.num_full, "the last block must be a short one"
    merged = AutoModelForCausalLM.from_pretrained(adapted / "export", dtype=torch.float32)
    nats, count = 0.0, 0
    with torch.no_grad():
        for index in range(blocks.num_all):
            inputs, labels = (torch.from_numpy(part) for part in blocks.rows([index]))
            logits = merged(inputs).logits.double().flatten(0, 1)
            nats += float(F.cross_entropy(logits, labels.flatten(), reduction="sum"))
            count += int((labels != -100).sum())
    assert count == blocks.packed.num_tokens - 1
    outcome = json.loads((adapted / "attempts/1/outcome.json").read_text())
    found = outcome["metrics"]
    assert found["validation_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    bits = nats / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / blocks.packed.num_bytes, rel=1e-4)
    assert found["validation_perplexity"] < found["validation_perplexity_before"] - 5
    # In between, only as much as is set: 1,024 tokens are not the whole text.
    losses = {line["step"]: line.get("validation_loss") for line in read_metrics(adapted)}
    assert set(losses) == {0, 3, 5, 6} and losses[5] is None
    assert math.exp(losses[0] or 0) == pytest.approx(found["validation_perplexity_before"])
    assert outcome["command"] == "make generate RUN= PROMPT='Heat the oven'"


def test_samples_are_what_transformers_generates(
    adapted: Path, tied_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(text) for text in (adapted / "samples.jsonl").read_text().splitlines()]
    shown = [(line["when"], line["step"], line["prompt"]) for line in lines]
    assert shown == [
        ("before", 0, "Heat the oven"),
        ("after", 6, "Heat the oven"),
        ("before", 0, "Stir the"),
        ("after", 6, "Stir the"),
    ]
    tokenizer = AutoTokenizer.from_pretrained(adapted / "export")
    for line in lines:
        folder = tied_model_folder if line["when"] == "before" else adapted / "export"
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        # As documents begin.
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(line["prompt"])]])
        tokens = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=1)
        assert line["text"] == tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert generate.main([str(adapted), "--prompt", "Stir the", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("Stir the")


def test_drawn_samples_follow_from_the_seed(
    make: Make, device: torch.device, tmp_path: Path
) -> None:
    words = ("--sample.temperature", "1", "--sample.prompts", "Stir", "--max_steps", "1")
    texts = []
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        config = make(*words, "--seed", seed, "--export", "false")
        assert run(config, tmp_path / name, device) == "finished"
        texts.append((tmp_path / name / "samples.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


# ---- stops ----


@pytest.mark.parametrize("method", ["lora", "full"])
def test_stopped_at_the_start_and_half_way_it_ends_the_same(
    make: Make, device: torch.device, tmp_path: Path, adapted: Path, method: str
) -> None:
    config = make("--method", method)
    straight = adapted
    if method == "full":
        straight = tmp_path / "straight"
        assert run(config, straight, device) == "finished"
    stopped = tmp_path / "stopped"
    signals.install_first()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert run(config, stopped, device) == "stopped"
    outcome = json.loads((stopped / "attempts/1/outcome.json").read_text())
    assert outcome["reason"] == "SIGUSR1" and outcome["checkpoint"] == "step-00000000"
    assert not (stopped / "samples.jsonl").exists()
    signals.forget_rehearsal()
    assert run(config, stopped, device, stop=True) == "rehearsed"
    signals.forget_rehearsal()
    assert run(config, stopped, device) == "finished"

    shard = "checkpoints/step-00000006/shard-00000-of-00001.safetensors"
    assert (stopped / shard).read_bytes() == (straight / shard).read_bytes()
    assert (stopped / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()

    def arithmetic(folder: Path) -> list[dict[str, Any]]:
        times = ("tokens_per_second", "data_wait", "peak_memory_gib")
        return [{k: v for k, v in line.items() if k not in times} for line in read_metrics(folder)]

    by_step = {line["step"]: line for line in arithmetic(stopped)}
    assert all(by_step[line["step"]] == line for line in arithmetic(straight))
