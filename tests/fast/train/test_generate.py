"""Generate: text from an exported model; what is wrong is one line and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from runfolder.errors import UserError
from tests import waiting
from tests.shared import CHECKOUT
from train import generate

Generate = Callable[..., str]


@pytest.fixture
def run(tied_model_folder: Path, tmp_path: Path) -> Path:
    """Return a run folder with an exported model of 32 positions."""
    shutil.copytree(tied_model_folder, tmp_path / "export")
    return tmp_path


@pytest.fixture
def sample(run: Path, environment: None, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Return a function that gives the text for a prompt."""

    def text(prompt: str, *options: str) -> str:
        capsys.readouterr()
        assert generate.main([str(run), "--prompt", prompt, *options]) == 0
        return capsys.readouterr().out

    return text


def test_text_comes_that_goes_on_from_the_prompt(sample: Generate) -> None:
    text = sample("The cluster", "--max_new_tokens", "8")
    assert text.startswith("The cluster")
    assert len(text) > len("The cluster\n")


def test_tokens_that_are_no_text_are_not_shown(sample: Generate) -> None:
    assert sample("<s>The cluster").startswith("The cluster")


def test_the_seed_decides_and_without_temperature_there_is_no_chance(sample: Generate) -> None:
    assert sample("The", "--seed", "1") == sample("The", "--seed", "1")
    assert sample("The", "--seed", "1") != sample("The", "--seed", "2")
    greedy = [sample("The", "--temperature", "0", "--seed", seed) for seed in "12"]
    assert greedy[0] == greedy[1]


def test_the_text_ends_where_the_models_context_does(
    sample: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, original = [], LlamaForCausalLM.generate

    def without_end(model: LlamaForCausalLM, **options: Any) -> torch.Tensor:
        tokens = original(model, **options, eos_token_id=None)
        lengths.append(tokens.shape[1])
        return tokens

    monkeypatch.setattr(LlamaForCausalLM, "generate", without_end)
    for asked in ("3", "1000"):
        sample("The cluster", "--max_new_tokens", asked)
    assert lengths[0] < lengths[1] == 32


def test_a_prompt_that_fills_the_context_is_refused_in_one_line(
    sample: Generate, run: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    prompt = "a"
    while len(tokenizer(prompt)["input_ids"]) < 31:
        prompt += " b"
    assert len(tokenizer(prompt)["input_ids"]) == 31
    assert sample(prompt).startswith(prompt)
    with pytest.raises(UserError, match=r"PROMPT: .* the 32 tokens of the model$"):
        sample(prompt + " b")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], 'PROMPT: is empty; give a beginning, such as PROMPT="The cluster"'),
        (["--prompt", ""], 'PROMPT: is empty; give a beginning, such as PROMPT="The cluster"'),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens: 0 is not positive"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature: -1.0 is negative"),
        (["--prompt", "a", "--top_p", "0"], "--top_p: 0.0 is not in (0, 1]"),
        (["--prompt", "a", "--top_p", "1.5"], "--top_p: 1.5 is not in (0, 1]"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(run: Path, options: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        generate.main([str(run), *options])
    assert str(refused.value) == line


def test_a_run_without_an_exported_model_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.generate", str(tmp_path), "--prompt", "a"]
    done = waiting.run(command, cwd=CHECKOUT, env=os.environ)
    line = f"error: {tmp_path}: has no exported model; run `make export RUN=...` first\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_gpt2_writes_text_too_whose_class_has_a_name_of_its_own(
    run: Path, sample: Generate
) -> None:
    vocab_size = json.loads((run / "export/config.json").read_text())["vocab_size"]
    shape = GPT2Config(vocab_size=vocab_size, n_positions=32, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(shape).save_pretrained(run / "export")
    assert sample("The cluster", "--max_new_tokens", "4").startswith("The cluster")


def test_a_model_that_writes_no_text_is_one_line(run: Path) -> None:
    (run / "export/config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UserError, match="is not a language model and cannot generate text"):
        generate.main([str(run), "--prompt", "x"])
