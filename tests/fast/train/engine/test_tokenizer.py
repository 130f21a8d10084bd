"""tokenizer.py: tokenizers copied, converted and trained, without torch but for conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, models

from train.engine import tokenizer
from train.engine.data import SAMPLES, Piece, pieces
from train.engine.errors import UserError

TEXT = "The cluster trains a model.\n  Ünïcode 語, tabs\tand   spaces.\n"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder with a tokenizer that was trained on the sample."""
    folder = tmp_path / "trained"
    folder.mkdir()
    text = pieces([SAMPLES / "train.txt"], text_column="text", join_rows=False)
    tokenizer.train(text, 400, folder, "the sample")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_a_trained_tokenizer_takes_any_text_and_gives_it_back(trained: Path) -> None:
    loaded = tokenizer.load(trained)
    assert loaded.vocab_size == 400
    ids = loaded.tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert loaded.tokenizer.decode(ids) == TEXT
    assert {loaded.bos_id, loaded.eos_id} == {0, 1}


def test_the_same_text_trains_the_same_tokenizer(trained: Path, out: Path) -> None:
    text = pieces([SAMPLES / "train.txt"], text_column="text", join_rows=False)
    tokenizer.train(text, 400, out, "the sample")
    assert (out / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_training_reads_no_more_than_the_head_of_the_text(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "TRAINING_CHARACTERS", 1000)
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield Piece("hello world " * 10, starts=True, ends=True)

    tokenizer.train(endless(), 300, out, "it")  # type: ignore[arg-type]
    assert taken < 20


@pytest.mark.parametrize("text", [[], [Piece(" \n\t ", starts=True, ends=True)]])
def test_no_text_trains_no_tokenizer(out: Path, text: list[Piece]) -> None:
    with pytest.raises(UserError, match=r"^data.train: x holds no text, or only white space"):
        tokenizer.train(text, 300, out, "data.train: x")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("source", ["", "tokenizer.json"])
def test_a_folder_or_its_tokenizer_json_is_copied(trained: Path, out: Path, source: str) -> None:
    (trained / "model.safetensors").touch()
    (trained / "chat_template.jinja").write_text("{{ x }}")
    tokenizer.place(trained / source, out)
    assert {path.name for path in out.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert tokenizer.load(out).eos_id == 1


def test_a_lone_tokenizer_json_has_no_special_tokens(trained: Path, out: Path) -> None:
    (trained / "tokenizer_config.json").unlink()
    tokenizer.place(trained, out)
    loaded = tokenizer.load(out)
    assert (loaded.bos_id, loaded.eos_id) == (None, None)


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}])
def test_special_tokens_are_found_as_text_as_object_and_in_the_older_file(
    trained: Path, token: object
) -> None:
    (trained / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert tokenizer.load(trained).eos_id == 1
    (trained / "tokenizer_config.json").write_text("{}")
    (trained / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
    assert tokenizer.load(trained).eos_id == 1


def test_the_vocabulary_reaches_to_the_largest_id_over_gaps(out: Path) -> None:
    words = models.WordLevel({"a": 0, "b": 70_000}, unk_token="a")
    Tokenizer(words).save(str(out / "tokenizer.json"))
    assert tokenizer.load(out).vocab_size == 70_001


def test_a_sentencepiece_model_becomes_a_tokenizer_with_the_same_ids(
    tmp_path: Path, out: Path
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        input=str(SAMPLES / "train.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=450,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer.place(tmp_path / "tokenizer.model", out)
    loaded = tokenizer.load(out)
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert loaded.tokenizer.encode(TEXT, add_special_tokens=False).ids == original.encode(TEXT)
    assert (loaded.bos_id, loaded.eos_id) == (original.bos_id(), original.eos_id())
    assert loaded.vocab_size == original.vocab_size()
    assert not (out / "source").exists()


def test_what_is_no_tokenizer_is_one_line_with_the_file(
    trained: Path, tmp_path: Path, out: Path
) -> None:
    def refusal(source: Path) -> str:
        with pytest.raises(UserError) as raised:
            tokenizer.place(source, out)
        return str(raised.value)

    other = trained / "vocab.json"
    other.touch()
    assert "is not named tokenizer.json or tokenizer.model" in refusal(other)
    bare = tmp_path / "bare"
    bare.mkdir()
    assert "bare holds neither tokenizer.json nor tokenizer.model" in refusal(bare)
    (bare / "tokenizer.model").write_bytes(b"\x0anot sentencepiece")
    assert "bare/tokenizer.model is not a sentencepiece model" in refusal(bare)
    (trained / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in refusal(trained)
    (trained / "tokenizer_config.json").write_text("[]")
    assert "cannot be read" in refusal(trained)
