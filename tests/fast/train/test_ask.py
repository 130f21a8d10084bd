"""Ask: passages with their scores, an answer where there is a model; what is wrong is one line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from runfolder.errors import UserError
from tests.models import write_tied_model
from train import ask
from train.engine import arguments
from train.labs.rag import script
from train.labs.rag.settings import Config

Ask = Callable[..., str]
# A title and a text that would clear the screen and turn the direction of writing.
STEERING = "title,text\n\x1b[2JTide,The Moon pulls on the \x9b31msea twice a day.\n"
STEERING += "Salt,\u202eIt keeps meat and fish through the winter.\n"
STEERING += "Owl,It hears the mouse in the dark and flies without a sound.\n"


@pytest.fixture(scope="module")
def run(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run over three passages, as `make run` leaves it."""
    folder = tmp_path_factory.mktemp("run")
    data = tmp_path_factory.mktemp("data") / "passages.csv"
    data.write_text(STEERING, encoding="utf-8")
    words = ["--dry_run", "--data.passages", str(data)]
    config = arguments.parse(Config, words, prog="test", dry_run=script.DRY_RUN)
    config = script.stage(config, online=False)
    (folder / "config.yaml").write_text(arguments.to_yaml(config), encoding="utf-8")
    assert script.train(config, folder, device, rehearse_stop=False) == "finished"
    return folder


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small causal language model of 256 positions."""
    return write_tied_model(
        tmp_path_factory.mktemp("models") / "writer",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


@pytest.fixture
def said(run: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Return a function that gives what is said to a question."""

    def text(question: str, *words: str) -> str:
        capsys.readouterr()
        assert ask.main([str(run), "--question", question, *words]) == 0
        return capsys.readouterr().out

    return text


def test_passages_come_with_title_score_and_id_and_the_best_first(said: Ask) -> None:
    text = said("It hears the mouse in the dark and flies without a sound.", "--k", "3")
    assert re.match(r"found 3 of 3 passages; encoder \d+ ms, index \d+\.\d ms\n", text)
    found = re.findall(r"^\[(\d)\] (.*)  score (-?\d\.\d{3})  id (\d+)$", text, re.MULTILINE)
    assert [number for number, *_ in found] == ["1", "2", "3"]
    assert found[0][1::2] == ("Owl", "2")
    scores = [float(score) for _, _, score, _ in found]
    assert 1 >= scores[0] >= scores[1] >= scores[2]
    assert "It hears the mouse in the dark" in text


def test_the_prompt_numbers_the_passages_as_they_are_shown(said: Ask) -> None:
    text = said("What does the owl hear?", "--show_prompt", "--k", "2")
    titles = re.findall(r"^\[(\d)\] (.*)  score", text, re.MULTILINE)
    for number, title in titles:
        assert f"\n[{number}] {title}\n" in text
    assert text.endswith("Question: What does the owl hear?\nAnswer:\n")


def test_nothing_is_found_below_the_threshold(said: Ask) -> None:
    text = said("What does the owl hear?", "--threshold", "1")
    assert re.match(r"nothing found: the best of 3 passages has score 0\.\d+, below 1 ", text)
    assert "Owl" not in text


def test_no_passage_steers_the_terminal(said: Ask) -> None:
    text = said("Why?", "--show_prompt")
    assert not {char for char in text if char in "\x1b\x9b\u202e"}
    assert "\\x1b[2JTide" in text
    assert "\\u202eIt keeps meat" in text


def test_an_answer_is_made_where_there_is_a_model(said: Ask, generator: Path) -> None:
    words = ["--generator.name", str(generator), "--max_new_tokens", "8", "--threshold", "-1"]
    said("What?", *words)  # once, the model is looked at
    first = said("What?", *words)
    assert re.search(r"\nanswer \(\d+\.\d s, passages 1 to [123]\):\n.+", first)
    without_times = [re.sub(r"\d+\.?\d* m?s", "", text) for text in (first, said("What?", *words))]
    assert without_times[0] == without_times[1], "the likeliest token, so always the same"


def test_a_run_remembers_its_generator(
    run: Path, generator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    words = ["--config", str(run / "config.yaml"), "--generator.name", str(generator)]
    config = arguments.parse(Config, words, prog="test", dry_run=script.DRY_RUN)
    config = script.stage(config, online=False)
    (copy / "config.yaml").write_text(arguments.to_yaml(config), encoding="utf-8")
    assert ask.main([str(copy), "--question", "What?", "--max_new_tokens", "4"]) == 0
    assert "\nanswer (" in capsys.readouterr().out


def test_questions_are_read_from_the_terminal_until_its_end(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: Iterator[str] = iter(
        ["What does the owl hear?", "", "  ", "\udcff", "What is salt for?"]
    )

    def read(prompt: str) -> str:
        for line in lines:
            if line == "\udcff":
                raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert ask.main([str(run)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("3 passages; Ctrl+D ends\n")
    assert text.count("found 3 of 3 passages") == 2
    assert text.count("that is not UTF-8 text") == 1
    assert text.endswith("\n")


def test_ctrl_c_ends_it_without_a_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert ask.main([str(run)]) == 130


# ---- wrong input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--question", ""], r'^Q: is empty; give a question, such as Q="Who was it\?"$'),
        (["--question", " \t"], "Q: is empty; give a question"),
        (["--question", "\udcff"], "Q: is not UTF-8 text"),
        ([], "Q: is empty, and there is no terminal to ask on"),
        (["--question", "a", "--k", "0"], "--k: 0 is not positive"),
        (["--question", "a", "--k", "4"], "--k: 4 is more than the number of passages, 3"),
        (["--question", "a", "--threshold", "1.5"], "--threshold: 1.5 is not a cosine, between"),
        (["--question", "a", "--threshold", "nan"], "--threshold: 'nan' is not a number"),
        (
            ["--question", "a", "--show_prompt", "--max_prompt_tokens", "9"],
            "--max_prompt_tokens: 9 tokens are too few",
        ),
        (["--question", "a", "--max_new_tokens", "0"], "--max_new_tokens: 0 is not positive"),
        (["--question", "a", "--generator.name", "none/of"], "generator.name: none/of is not stag"),
        (["--question", "a", "--treshold", "0"], "--treshold is not a setting; .*'threshold'"),
    ],
)
def test_a_wrong_word_is_one_line(run: Path, words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        ask.main([str(run), *words])


def test_an_answer_that_leaves_no_room_is_refused(run: Path, generator: Path) -> None:
    words = ["--question", "a", "--generator.name", str(generator), "--max_new_tokens", "256"]
    with pytest.raises(UserError, match=r"--max_new_tokens: 256 leaves no room .* 256 tokens"):
        ask.main([str(run), *words])


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        ("index", "has no index; let the run finish, with `make run RUN=`"),
        ("config", "has no config.yaml; give a run that `make run` started"),
        ("lab", "is not a run of the lab rag; give one, such as RUN=rag"),
        ("encoder", r"index: was made with encoder tiny, random weights \(.*\), not tiny"),
        ("damage", r"index: is damaged \(flat-.*\.faiss has \d+ bytes instead of \d+\)"),
        ("manifest", r"index: is damaged \(manifest.json cannot be read\)"),
        ("chunks", "was made with chunk length 64, not 32"),
        ("gone", "/no/such: does not exist; set SLUICE_DATASETS to the datasets folder"),
    ],
)
def test_a_run_that_cannot_be_asked_is_refused(
    run: Path, tmp_path: Path, spoil: str, line: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config, manifest = copy / "config.yaml", copy / "index/manifest.json"
    [index] = (copy / "index").glob("*.faiss")
    if spoil == "index":
        shutil.rmtree(copy / "index")
    elif spoil == "config":
        config.unlink()
    elif spoil == "lab":
        config.write_text("model:\n  preset: tiny\nmax_steps: 20\n")
    elif spoil == "encoder":
        found = json.loads(manifest.read_text())
        found["made_of"]["weights_sha256"] = "0" * 64
        manifest.write_text(json.dumps(found))
    elif spoil == "damage":
        index.write_bytes(index.read_bytes()[1:])
    elif spoil == "manifest":
        manifest.write_text("{")
    elif spoil == "chunks":
        config.write_text(config.read_text().replace("length: 64", "length: 32"))
    else:
        text = re.sub(r"^  passages: [^/]\S+$", "  passages: /no/such", config.read_text(), flags=8)
        config.write_text(text)
    with pytest.raises(UserError, match=line):
        ask.main([str(copy), "--question", "What?"])


def test_passages_that_were_changed_are_not_the_indexs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets_folder: Path
) -> None:
    changed = tmp_path / "datasets"
    shutil.copytree(datasets_folder, changed)
    for file in changed.glob("passages/*/rows.jsonl"):
        file.write_text(file.read_text(encoding="utf-8").replace("mouse", "louse"))
    monkeypatch.setenv("SLUICE_DATASETS", str(changed))
    with pytest.raises(UserError, match=r"index: was made with passages sha256 .*, not"):
        ask.main([str(run), "--question", "What?"])
