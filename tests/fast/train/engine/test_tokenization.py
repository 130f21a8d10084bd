"""tokenizer.py: tokenizers as transformers reads them, trained ones, and documents' frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from runfolder.errors import UserError
from train.engine import batches, tokenization, transformers_tokenizer
from train.engine.data import SAMPLES, Piece, pieces

TEXT = "The cluster trains a model.\n  Ünïcode 語, tabs\tand   spaces.\n"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder with a tokenizer that was trained on the sample."""
    folder = tmp_path / "trained"
    folder.mkdir()
    text = pieces([SAMPLES / "train.txt"], text_column="text", join_rows=False)
    tokenization.train(text, 400, folder, "the sample")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_a_trained_tokenizer_takes_any_text_and_gives_it_back(trained: Path) -> None:
    loaded = tokenization.load(trained)
    assert loaded.vocab_size == 400
    ids = loaded.tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert loaded.tokenizer.decode(ids) == TEXT
    assert {loaded.bos_id, loaded.eos_id} == {0, 1}


def test_the_same_text_trains_the_same_tokenizer(trained: Path, out: Path) -> None:
    text = pieces([SAMPLES / "train.txt"], text_column="text", join_rows=False)
    tokenization.train(text, 400, out, "the sample")
    assert (out / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_training_reads_no_more_than_the_head_of_the_text(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "TRAINING_CHARACTERS", 1000)
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield Piece("hello world " * 10, starts=True, ends=True)

    tokenization.train(endless(), 300, out, "it")  # type: ignore[arg-type]
    assert taken < 20


@pytest.mark.parametrize("text", [[], [Piece(" \n\t ", starts=True, ends=True)]])
def test_no_text_trains_no_tokenizer(out: Path, text: list[Piece]) -> None:
    with pytest.raises(UserError, match=r"^data.train: x holds no text, or only white space"):
        tokenization.train(text, 300, out, "data.train: x")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("source", ["", "tokenizer.json"])
def test_a_folder_or_its_tokenizer_json_is_copied(trained: Path, out: Path, source: str) -> None:
    (trained / "model.safetensors").touch()
    (trained / "chat_template.jinja").write_text("{{ x }}")
    transformers_tokenizer.place(trained / source, out)
    assert {path.name for path in out.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "frame.json",
    }
    assert tokenization.load(out).eos_id == 1


def test_a_lone_tokenizer_json_has_no_special_tokens(trained: Path, out: Path) -> None:
    (trained / "tokenizer_config.json").unlink()
    transformers_tokenizer.place(trained, out)
    loaded = tokenization.load(out)
    assert (loaded.bos_id, loaded.eos_id) == (None, None)


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}])
def test_special_tokens_of_an_older_folder_are_found_as_text_as_object_and_in_the_older_file(
    trained: Path, token: object
) -> None:
    (trained / tokenization.FRAME).unlink()
    (trained / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert tokenization.load(trained).eos_id == 1
    (trained / "tokenizer_config.json").write_text("{}")
    (trained / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
    assert tokenization.load(trained).eos_id == 1


def test_the_vocabulary_reaches_to_the_largest_id_over_gaps(out: Path) -> None:
    words = models.WordLevel({"a": 0, "b": 70_000}, unk_token="a")
    Tokenizer(words).save(str(out / "tokenizer.json"))
    assert tokenization.load(out).vocab_size == 70_001


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
    transformers_tokenizer.place(tmp_path / "tokenizer.model", out)
    loaded = tokenization.load(out)
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
            transformers_tokenizer.place(source, out)
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


# ---- folders of the field: what transformers makes of them, and the frame of a document ----

WORDS = ["the", "cluster", "<", ">", "/", "s", "|", "unk"]


def write_folder(folder: Path, *, added: tuple[str, ...] = ("<s>", "</s>"), **files: Any) -> Path:
    """Write a byte-level tokenizer with special tokens `added`, and JSON files by their names."""
    folder.mkdir(exist_ok=True)
    text = (Piece(text, starts=True, ends=True) for text in [" ".join(WORDS) * 20, TEXT])
    tokenization.train(text, 300, folder, "the words")
    (folder / tokenization.FRAME).unlink()
    (folder / "tokenizer_config.json").unlink()
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens(list(added))
    made.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def placed(source: Path) -> tokenization.LoadedTokenizer:
    out = source.with_name(f"{source.name}-placed")
    out.mkdir()
    transformers_tokenizer.place(source, out)
    return tokenization.load(out)


@pytest.mark.parametrize("option", ["truncation", "padding"])
def test_a_tokenizer_that_was_saved_after_a_call_cuts_and_pads_nothing(
    tmp_path: Path, option: str
) -> None:
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    source = write_folder(tmp_path / "source", tokenizer_config=named)
    whole = placed(source).tokenizer.encode(TEXT * 9, add_special_tokens=False).ids
    assert len(whole) > 16
    saved = AutoTokenizer.from_pretrained(source)
    saved(TEXT, max_length=16, **{option: True if option == "truncation" else "max_length"})
    again = tmp_path / "again"
    saved.save_pretrained(again)
    assert json.loads((again / "tokenizer.json").read_text())[option] is not None
    found = placed(again)
    assert found.tokenizer.encode(TEXT * 9, add_special_tokens=False).ids == whole
    assert found.tokenizer.encode("a", add_special_tokens=False).ids == [
        found.tokenizer.token_to_id("a")
    ]


# (tokenizer_config.json, config.json) -> (bos, eos), by their texts.
FRAMES: list[tuple[dict[str, Any] | None, dict[str, Any] | None, str | None, str | None]] = [
    ({"bos_token": "<s>", "eos_token": "</s>"}, None, "<s>", "</s>"),
    ({"eos_token": "</s>"}, None, None, "</s>"),
    # config.json counts where the tokenizer says nothing, not where it says null.
    (None, {"bos_token_id": 0, "eos_token_id": 1}, "<s>", "</s>"),
    ({"eos_token": "</s>"}, {"bos_token_id": 0, "eos_token_id": 0}, "<s>", "</s>"),
    ({"bos_token": None, "eos_token": "</s>"}, {"bos_token_id": 0}, None, "</s>"),
    (None, {"eos_token_id": [1, 300, 301]}, None, "</s>"),
    # An id that the tokenizer lacks does not count.
    (None, {"bos_token_id": 9000, "eos_token_id": 1}, None, "</s>"),
    # Never seen at the start of a text.
    ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}, None, None, "</s>"),
    # As GPT-2: one token between two documents.
    ({"bos_token": "</s>", "eos_token": "</s>"}, None, None, "</s>"),
    (None, None, None, None),
]


@pytest.mark.parametrize(("tokenizer_config", "config", "bos", "eos"), FRAMES)
def test_the_frame_of_a_document(
    tmp_path: Path,
    tokenizer_config: dict[str, Any] | None,
    config: dict[str, Any] | None,
    bos: str | None,
    eos: str | None,
) -> None:
    files = {
        "tokenizer_config": tokenizer_config,
        "config": config and {"model_type": "llama"} | config,
    }
    source = write_folder(tmp_path / "source", **{k: v for k, v in files.items() if v is not None})
    loaded = placed(source)
    of = loaded.tokenizer.token_to_id
    assert loaded.starts == ([] if bos is None else [of(bos)])
    assert loaded.ends == ([] if eos is None else [of(eos)])
    folder = tmp_path / "packed"
    folder.mkdir()
    documents = ["the cluster", "a <b> b", "the"]
    batches.pack(
        (Piece(text, starts=True, ends=True) for text in documents), loaded, folder, "the text"
    )
    tokens = np.fromfile(folder / "tokens.bin", dtype=np.uint16).tolist()
    expected: list[int] = []
    plain = Tokenizer.from_file(str(source / "tokenizer.json"))
    for text in documents:
        ids = plain.encode(text, add_special_tokens=False).ids
        expected += loaded.starts + ids + loaded.ends
    assert tokens == expected
    if bos and eos:
        assert tokens.count(of(bos)) == tokens.count(of(eos)) == len(documents)


def test_a_text_that_spells_a_token_is_text_and_said_so(tmp_path: Path) -> None:
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    source = write_folder(tmp_path / "source", tokenizer_config=named)
    loaded = placed(source)
    text = "a <s>struck</s> price, <s>twice</s>"
    assert not {0, 1} & set(loaded.tokenizer.encode(text, add_special_tokens=False).ids)
    out = tmp_path / "source-placed"
    taken = tokenization.load(out, parse_special_tokens=True)
    ids = taken.tokenizer.encode(text, add_special_tokens=False).ids
    assert (ids.count(0), ids.count(1)) == (2, 2)
    assert ids == AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False)["input_ids"]
    # A document that has its frame already is not given another.
    for tokens, framed in ((loaded, 4), (taken, 2)):
        folder = tmp_path / f"packed-{framed}"
        folder.mkdir()
        pieces = [Piece("<s>the cluster</s>", starts=True, ends=True)]
        packed = batches.pack(pieces, tokens, folder, "the text")
        written = np.fromfile(folder / "tokens.bin", dtype=np.uint16).tolist()
        assert (written[0], written[-1]) == (0, 1)
        assert written.count(0) == written.count(1) == 1
        assert packed.spelled == ({"</s>": 1, "<s>": 1} if tokens is loaded else {})


def test_what_the_chat_template_writes_is_a_token_wherever_it_stands(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": template}
    added = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|fim|>")
    source = write_folder(tmp_path / "source", added=added, tokenizer_config=named)
    loaded = placed(source)
    text = "<|im_start|>the cluster<|im_end|> <s> <|fim|>"
    ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
    of = loaded.tokenizer.token_to_id
    assert [ids.count(of(token)) for token in added] == [0, 0, 1, 1, 1]
    assert loaded.ends == [of("<|im_end|>")]
    assert loaded.decode(ids) == "the cluster <s> "


def test_an_end_that_the_chat_template_names_is_read_and_said(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    loaded = placed(write_folder(tmp_path / "source", tokenizer_config=named))
    ids = loaded.tokenizer.encode("<s>the cluster</s> the", add_special_tokens=False).ids
    assert (ids.count(0), ids.count(1)) == (0, 1)
    pieces = [Piece(text, starts=True, ends=True) for text in ("the cluster</s>", "the</s>the")]
    packed = batches.pack(pieces, loaded, tmp_path, "the text")
    tokens = np.fromfile(tmp_path / "tokens.bin", dtype=np.uint16).tolist()
    assert (tokens.count(0), tokens.count(1)) == (2, 3)
    assert (packed.read, packed.spelled) == ({"</s>": 2}, {})
    assert "'</s>' appears 2 times and is taken as the end" in packed.describe()


def test_a_token_that_no_text_becomes_needs_no_embedding(tmp_path: Path) -> None:
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
    source = write_folder(
        tmp_path / "source", added=("<s>", "</s>", "[PAD]"), tokenizer_config=named
    )
    loaded = placed(source)
    pad = loaded.tokenizer.token_to_id("[PAD]")
    assert (loaded.vocab_size, loaded.text_vocab_size) == (pad + 1, pad)
    lacking = named | {"eos_token": "<|end|>"}
    other = placed(write_folder(tmp_path / "other", tokenizer_config=lacking))
    # transformers adds it, behind all that the model knows.
    assert other.ends == [other.text_vocab_size - 1]


def test_added_tokens_beside_a_sentencepiece_model_are_those_of_transformers(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(SAMPLES / "train.txt"),
        model_prefix=str(source / "tokenizer"),
        vocab_size=450,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (source / "tokenizer.vocab").unlink()
    ends = {"<|im_end|>": 450, "<|im_start|>": 451}
    (source / "added_tokens.json").write_text(json.dumps(ends))
    template = "{{ '<|im_start|>' + messages[0]['content'] + '<|im_end|>' }}"
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "chat_template": template,
        "legacy": False,
        "added_tokens_decoder": {
            str(number): {"content": token, "special": True} for token, number in ends.items()
        },
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    text = "<|im_start|>Which river runs through the town?<|im_end|>\n" * 3
    expected = AutoTokenizer.from_pretrained(source)
    loaded = placed(source)
    ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == expected(text, add_special_tokens=False)["input_ids"]
    assert (ids.count(450), ids.count(451)) == (3, 3)
    assert (loaded.starts, loaded.ends) == ([expected.bos_token_id], [450])
    again = AutoTokenizer.from_pretrained(tmp_path / "source-placed")
    messages = [{"role": "user", "content": "hi"}]
    assert again.apply_chat_template(messages, tokenize=False) == "<|im_start|>hi<|im_end|>"
    assert again(text)["input_ids"] == expected(text)["input_ids"]


def test_vocab_json_with_merges_is_read(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "json", tokenizer_config={"eos_token": "</s>"})
    expected = placed(source).tokenizer.encode(TEXT, add_special_tokens=False).ids
    bare = tmp_path / "bare"
    bare.mkdir()
    Tokenizer.from_file(str(source / "tokenizer.json")).model.save(str(bare))
    named = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "</s>"}
    (bare / "tokenizer_config.json").write_text(json.dumps(named))
    loaded = placed(bare)
    assert loaded.tokenizer.encode(TEXT, add_special_tokens=False).ids == expected
    assert loaded.ends == [1]


def test_a_tokenizer_that_leaves_text_out_is_refused(tmp_path: Path) -> None:
    words = models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    made = Tokenizer(words)
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenization.load(tmp_path)
    with pytest.raises(UserError, match=r"the text: 1 document, 240 bytes, 1 tokens .240.00 bytes"):
        batches.pack([Piece("word " * 48, starts=True, ends=True)], loaded, tmp_path, "the text")
