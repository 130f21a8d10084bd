"""Lab 5: the loss of the answers by hand, packed or not; what is held back and refused."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from runfolder.errors import UserError
from tests.conftest import read_metrics
from train.engine import arguments, signals
from train.engine.once import staged_path
from train.labs.chat import script
from train.labs.chat.examples import Examples
from train.labs.chat.settings import Config
from train.labs.chat.sources import SAMPLE

Make = Callable[..., Config]
SHORT = ("--max_steps", "4", "--evaluation.every_steps", "2", "--checkpoint.every_steps", "2")


@pytest.fixture(scope="module")
def make(environment: None, model_folder: Path) -> Make:
    """Return a function that gives a dry run's settings, staged, of a model folder."""

    def parse(*words: str) -> Config:
        model = ("--model.preset", "null", "--model.name", str(model_folder))
        return arguments.parse(
            Config, ["--dry_run", *model, *SHORT, *words], prog="test", dry_run=script.DRY_RUN
        )

    return lambda *words: script.stage(parse(*words), online=False)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model with room for a conversation, whose tokenizer has no chat template."""
    from tests.models import write_tied_model

    return write_tied_model(
        tmp_path_factory.mktemp("model"),
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=192,
    )


@pytest.fixture(autouse=True)
def no_signal() -> Iterator[None]:
    yield
    signals.forget_rehearsal()


def run(config: Config, folder: Path, device: torch.device, *, stop: bool = False) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(arguments.to_yaml(config))
    return script.train(config, folder, device, rehearse_stop=stop)


@pytest.fixture(scope="module")
def finished(make: Make, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run, packed; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(make(), folder, device) == "finished"
    return folder


def by_hand(model_folder: Path, tokenizer_folder: Path, rows: list[Any]) -> tuple[float, int]:
    """Return the loss in nats and the number of learned tokens, by plain transformers.

    Each conversation alone; an answer is what follows the text that asks for it.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    nats, count = 0.0, 0
    for row in rows:
        turns = row["messages"]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        labels = [-100] * len(ids)
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                asked = tokenizer.apply_chat_template(
                    turns[:number], add_generation_prompt=True, return_dict=False
                )
                end = ids.index(tokenizer.eos_token_id, len(asked)) + 1
                labels[len(asked) : end] = ids[len(asked) : end]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        targets = torch.tensor(labels[1:])
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        count += int((targets != -100).sum())
    return nats, count


def rows_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_loss_is_that_of_the_answers_by_hand_packed_or_not(
    finished: Path, make: Make, model_folder: Path, device: torch.device, tmp_path: Path
) -> None:
    validation = rows_of(SAMPLE / "validation.jsonl")
    nats, count = by_hand(model_folder, finished / "export", validation)
    assert read_metrics(finished)[0]["validation_loss"] == pytest.approx(nats / count, rel=1e-6)
    nats, count = by_hand(finished / "export", finished / "export", validation)
    last = read_metrics(finished)[-1]
    assert last["validation_loss"] == pytest.approx(nats / count, rel=1e-6)
    said = sum(
        len(turn["content"].encode())
        for row in validation
        for turn in row["messages"]
        if turn["role"] == "assistant"
    )
    assert last["bits_per_byte"] == pytest.approx(nats / math.log(2) / said, rel=1e-5)

    config = make("--data.packing", "false")
    assert config.staged is not None
    alone = Examples(staged_path(config.staged.validation))
    assert (alone.num_all, alone.summary.num_targets) == (len(validation), count)
    assert run(config, tmp_path, device) == "finished"
    assert read_metrics(tmp_path)[0]["validation_loss"] == pytest.approx(
        read_metrics(finished)[0]["validation_loss"], rel=1e-6
    )


def test_a_step_divides_by_the_tokens_that_are_learned(
    make: Make, finished: Path, model_folder: Path, device: torch.device, tmp_path: Path
) -> None:
    # All training conversations in one step: its loss is that of the untrained model on them.
    config = make("--data.packing", "false", "--max_steps", "1", "--export", "false")
    assert config.staged is not None
    rows = rows_of(SAMPLE / "train.jsonl")
    config.batch.global_batch_size, config.batch.micro_batch_size = len(rows), 8
    config.log_every_steps = 1
    assert run(config, tmp_path, device) == "finished"
    nats, count = by_hand(model_folder, finished / "export", rows)
    assert read_metrics(tmp_path)[1]["loss"] == pytest.approx(nats / count, rel=1e-6)
    assert read_metrics(tmp_path)[1]["tokens"] == count


def test_samples_are_what_transformers_answers(finished: Path, model_folder: Path) -> None:
    lines = rows_of(finished / "samples.jsonl")
    assert [(line["when"], line["prompt"]) for line in lines] == [
        ("before", "How do I boil an egg?"),
        ("after", "How do I boil an egg?"),
    ]
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    turns = [{"role": "user", "content": "How do I boil an egg?"}]
    asked = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    for line in lines:
        folder = model_folder if line["when"] == "before" else finished / "export"
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokens = model.generate(**asked, max_new_tokens=24, do_sample=False, pad_token_id=1)
        answer = tokens[0, asked["input_ids"].shape[1] :]
        assert line["text"] == tokenizer.decode(answer, skip_special_tokens=True)


def test_new_tokens_begin_as_the_mean_and_end_the_answers(
    make: Make, model_folder: Path, device: torch.device, tmp_path: Path
) -> None:
    config = make("--data.chat_template", "chatml", "--max_steps", "1", "--optimizer.lr", "1e-12")
    assert run(config, tmp_path, device) == "finished"
    old = load_file(model_folder / "model.safetensors")["model.embed_tokens.weight"]
    new = load_file(tmp_path / "export/model.safetensors")["model.embed_tokens.weight"]
    assert new.shape == (402, 32)
    torch.testing.assert_close(new[:400], old, rtol=0, atol=1e-9)
    torch.testing.assert_close(new[400:], old.mean(0).expand(2, -1), rtol=0, atol=1e-7)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [400, 401]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    # The one that it had, and the template's.
    assert exported.generation_config.eos_token_id == [1, 401]
    with pytest.raises(UserError, match=r"data.chat_template: .* adapters cannot learn new ones"):
        make("--data.chat_template", "chatml", "--method", "lora")


def test_adapters_train_on_conversations(make: Make, device: torch.device, tmp_path: Path) -> None:
    assert run(make("--method", "lora"), tmp_path, device) == "finished"
    before, *_, after = (
        line["validation_loss"] for line in read_metrics(tmp_path) if "validation_loss" in line
    )
    assert after < before - 0.01
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.chat_template.startswith("{{ bos_token }}{% for message in messages %}")


def test_stopped_half_way_it_ends_the_same(
    make: Make, finished: Path, device: torch.device, tmp_path: Path
) -> None:
    config = make()
    signals.install_first()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert run(config, tmp_path, device) == "stopped"
    signals.forget_rehearsal()
    assert run(config, tmp_path, device, stop=True) == "rehearsed"
    signals.forget_rehearsal()
    assert run(config, tmp_path, device) == "finished"
    shard = "checkpoints/step-00000004/shard-00000-of-00001.safetensors"
    assert (tmp_path / shard).read_bytes() == (finished / shard).read_bytes()
    keys = ("loss", "validation_loss", "tokens")
    found, expected = (
        [[line.get(key) for key in keys] for line in read_metrics(folder) if line["step"] in (0, 4)]
        for folder in (tmp_path, finished)
    )
    assert found == expected
    for words, message in (
        ("--data.learn last_answer", "was made with data.learn answers, not last_answer"),
        ("--method lora", "was made with method full"),
    ):
        with pytest.raises(UserError, match=message):
            run(make(*words.split()), tmp_path, device)


# ---- which rows ----


def chats(folder: Path, count: int) -> Path:
    file = folder / "chats.jsonl"
    rows = [{"prompt": f"{number} + 1", "completion": f"{number + 1}"} for number in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_one_row_in_so_many_is_held_back_and_said(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make("--data.train", str(chats(tmp_path, 22)), "--data.hold_back_every", "10")
    assert config.staged is not None
    train, validation = (
        Examples(staged_path(name)).summary
        for name in (config.staged.train, config.staged.validation)
    )
    assert (train.num_conversations, validation.num_conversations) == (20, 2)
    said = capsys.readouterr().out
    assert "data.train: 1 file, columns prompt, completion; 20 conversations, 20 answers" in said
    assert (
        "one row in 10 of data.train: 1 file, columns prompt, completion; 2 conversations" in said
    )
    with pytest.raises(
        UserError,
        match=r"^one row in 10 of data.train: .*: there is none; give more rows, or a smaller",
    ):
        make("--data.train", str(chats(tmp_path, 9)), "--data.hold_back_every", "10")


def test_rows_that_are_no_conversations_are_left_out_if_told_so_and_counted(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = [{"messages": [*turns, {"role": "bot", "content": "c"}]}, {"messages": turns[:1]}]
    (tmp_path / "raises.jinja").write_text(
        "{% for m in messages %}{{ m['content'] + eos_token }}{% if m['content'] == 'no' %}"
        "{{ raise_exception('not this one') }}{% endif %}{% endfor %}"
    )
    refused = {"messages": [*turns, {"role": "user", "content": "no"}]}
    file = tmp_path / "chats.jsonl"
    rows = [{"messages": turns}] * 6 + bad + [refused]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--data.train", str(file), "--data.hold_back_every", "5")
    words += ("--data.chat_template", str(tmp_path / "raises.jinja"))
    with pytest.raises(UserError, match=r":7: turn 3: its role .* --data.bad_rows leave_out\)$"):
        make(*words)
    config = make(*words, "--data.bad_rows", "leave_out")
    assert config.staged is not None
    assert Examples(staged_path(config.staged.train)).summary.num_conversations == 5
    said = capsys.readouterr().out
    assert f"columns messages; 3 rows are left out, the first: {file}:7: turn 3: its role" in said
    assert "; 5 conversations, 5 answers" in said


def test_the_same_conversations_on_both_sides_are_warned_of(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    train, validation = chats(tmp_path, 12), chats(tmp_path / "other", 6)
    make("--data.train", str(train), "--data.validation", str(validation))
    assert "warning: data.validation: all of its text" in capsys.readouterr().out


# ---- what is refused ----

WRONG = [
    ("--data.validation x.jsonl", "data.validation: is given without data.train"),
    ("--data.train nowhere.jsonl", "data.train: nowhere.jsonl does not exist"),
    ("--data.train {folder}/text.txt", "text.txt has no columns; give jsonl, csv or parquet"),
    ("--data.train {folder}/empty.jsonl", "empty.jsonl: there is none; give more rows"),
    ("--data.hold_back_every 1", "data.hold_back_every: 1 is less than 2"),
    ("--data.learn questions", "'questions' is not one of answers, last_answer"),
    ("--data.too_long split", "'split' is not one of cut_end, cut_front, leave_out"),
    ("--data.chat_template nowhere.jinja", "data.chat_template: nowhere.jinja cannot be read"),
    ("--data.chat_template {folder}/raises.jinja", "the chat template does not take it: no thanks"),
    ("--data.chat_template {folder}/broken.jinja", "the chat template does not take it:"),
    ("--data.sequence_length 193", "data.sequence_length: 193 is more than the 192 positions"),
    ("--data.sequence_length 4", "all 32 conversations are left out: too long, or no answer"),
    ("--data.column chat", "has no column 'chat'; choose from messages with --data.column"),
    ("--compile true", "compile: packed conversations have other lengths at each step"),
    ("--sample.max_new_tokens 190", "sample.max_new_tokens: 190 and the"),
    ("--data.text_column text", "--data.text_column is not a setting"),
    ("--method full --lora.rank 4", "lora: is only used with method lora"),
    ("--batch.global_batch_size 0", "batch.global_batch_size: 0 is not positive"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[words for words, _ in WRONG])
def test_what_is_wrong_is_one_line(make: Make, words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Hello.\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "raises.jinja").write_text("{{ raise_exception('no thanks') }}")
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    with pytest.raises(UserError) as refused:
        make(*words.format(folder=tmp_path).split())
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
