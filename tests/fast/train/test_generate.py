"""Generate: text from an exported model; what is wrong is one line and exit code 2."""

from __future__ import annotations

import io
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
from train.engine.generation import Writer

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
        tokens = original(model, **options | {"eos_token_id": None})
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
        ([], 'standard input: is empty; give a beginning, such as PROMPT="The cluster"'),
        (["--prompt", "\udcff"], "PROMPT: is not UTF-8 text; check the terminal's encoding"),
        (["--prompt", "a", "--prompt_file", "x"], "PROMPT: give it or PROMPT_FILE, not both"),
        (
            ["--prompt_file", "/none"],
            "PROMPT_FILE=/none: cannot be read: No such file or directory",
        ),
        (["--prompt_file", "/"], "PROMPT_FILE=/: cannot be read: Is a directory"),
        (["--prompt_file", "/bin/true"], "PROMPT_FILE=/bin/true: is not UTF-8 text"),
        (
            ["--prompt_file", "/dev/null"],
            'PROMPT_FILE=/dev/null: is empty; give a beginning, such as PROMPT="The cluster"',
        ),
        (["--prompt", ""], 'PROMPT: is empty; give a beginning, such as PROMPT="The cluster"'),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens: 0 is not positive"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature: -1.0 must be 0 or more"),
        (["--prompt", "a", "--top_p", "0"], "--top_p: 0.0 is not in (0, 1]"),
        (["--prompt", "a", "--top_p", "1.5"], "--top_p: 1.5 is not in (0, 1]"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(
    run: Path, options: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", written(""))
    with pytest.raises(UserError) as refused:
        generate.main([str(run), *options])
    assert str(refused.value) == line


@pytest.mark.parametrize("of", ["input", "file"])
def test_a_prompt_is_the_bytes_of_a_file_or_of_standard_input_without_the_last_newline(
    run: Path,
    environment: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    of: str,
) -> None:
    prompt = "  @a\r\n\t'$x' # \\\n\n"
    words = []
    if of == "file":
        (tmp_path / "a prompt").write_bytes(f"{prompt}\n".encode())
        words = ["--prompt_file", str(tmp_path / "a prompt")]
    monkeypatch.setattr(sys, "stdin", written(f"{prompt}\n" if of == "input" else "no"))
    fed: list[list[int]] = []
    monkeypatch.setattr(Writer, "write", lambda writer, ids: fed.append(ids) or [])
    assert generate.main([str(run), *words]) == 0
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert fed == [tokenizer(prompt)["input_ids"]]
    shown, notes = capsys.readouterr()
    assert shown == f"{prompt}\n"
    assert ("note: the prompt is read from standard input\n" in notes) == (of == "input")


def written(text: str) -> io.TextIOWrapper:
    """Return a standard input that is not a terminal, with this text."""
    return io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")


def test_a_model_folder_is_taken_as_well_and_nothing_else_is_said(
    run: Path, environment: None, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = run / "export"
    # Draws that transformers would warn of where none are made.
    settings = {"eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_k": 5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    words = ["--prompt", "The", "--max_new_tokens", "2", "--temperature", "0"]
    texts = []
    for place in (folder, run):
        assert generate.main([str(place), *words]) == 0
        text, errors = capfd.readouterr()
        texts.append(text)
        assert errors == ""
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        ("weights", r"export/model.safetensors is cut short: .* bytes; download the model again"),
        ("adapters", r"export holds adapters \(LoRA\), not the model that they belong to"),
        ("tokenizer", r"export: its tokenizer cannot be loaded: "),
        ("vocabulary", r"the tokenizer has a token 28\d, and the model only 280 tokens"),
    ],
)
def test_an_export_that_cannot_be_used_is_one_line(
    run: Path, environment: None, spoil: str, line: str
) -> None:
    folder = run / "export"
    if spoil == "weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    elif spoil == "adapters":
        (folder / "config.json").rename(folder / "adapter_config.json")
    elif spoil == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    else:
        shape = GPT2Config(vocab_size=280, n_positions=32, n_embd=8, n_layer=1, n_head=1)
        GPT2LMHeadModel(shape).save_pretrained(folder)
    with pytest.raises(UserError, match=line) as refused:
        generate.main([str(run), "--prompt", "The cluster"])
    assert not str(refused.value).startswith("model.name")


def test_a_run_without_an_exported_model_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.generate", str(tmp_path), "--prompt", "a"]
    done = waiting.run(command, cwd=CHECKOUT, env=os.environ)
    line = (
        f"error: {tmp_path}: has no exported model; run `make export RUN=...` first, or give "
        "MODEL=, a Hugging Face model folder\n"
    )
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
