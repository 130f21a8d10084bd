"""Chunks: never too long, no word lost, cut where sentences end."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from runfolder.errors import UserError
from train.engine.data import SAMPLES
from train.labs.rag.chunks import ChunkSettings, cut, short_title, titled


def _word_pieces() -> Tokenizer:
    """Return a tokenizer like BERT's: lower case, word pieces, [CLS] and [SEP] around."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train([str(SAMPLES / "validation.txt")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _bytes() -> Tokenizer:
    """Return a tokenizer like GPT-2's, whose tokens hold the space before a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(SAMPLES / "validation.txt")], trainer)
    return tokenizer


def _sentence_pieces() -> Tokenizer:
    """Return a tokenizer like Llama's, to which a stretch begins with a space that is not there."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train([str(SAMPLES / "validation.txt")], trainer)
    return tokenizer


TOKENIZERS = {
    "word pieces": _word_pieces(),
    "bytes": _bytes(),
    "sentence pieces": _sentence_pieces(),
}
WORDS = st.sampled_from(
    [
        "The",
        "sea",
        "rises",
        "twice",
        "a day.",
        "Why?",
        "caf\u00e9",
        "\u6d77\u3002",
        "x" * 60,
        "\n",
        "3.14",
        "\u00ad",
    ]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=120).map(" ".join)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(
    text=TEXTS,
    title=st.just("") | TEXTS.map(lambda text: text[:80]),
    length=st.integers(16, 64),
    data=st.data(),
)
def test_no_chunk_is_too_long_and_no_character_is_lost(
    kind: str, text: str, title: str, length: int, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[kind]
    overlap = data.draw(st.integers(0, length // 2))
    chunk_settings = ChunkSettings(length=length, overlap=overlap)
    chunks = list(cut(7, title, text, tokenizer=tokenizer, settings=chunk_settings))
    covered = set()
    for chunk in chunks:
        shown = titled(title[: chunk.title_end], text[chunk.start : chunk.end])
        assert len(tokenizer.encode(shown).ids) == chunk.tokens <= length
        assert chunk.passage == 7
        covered |= set(range(chunk.start, chunk.end))
    # What the tokenizer sees of the text; BERT's drops control characters and soft hyphens.
    tokens = tokenizer.encode(text, add_special_tokens=False).offsets
    seen = {i for start, end in tokens for i in range(start, end) if not text[i].isspace()}
    assert seen <= covered
    assert [c.start for c in chunks] == sorted({c.start for c in chunks}), "each begins later"


SENTENCES = [f"Sentence number {n} is here to be read by the encoder." for n in range(20)]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_chunks_begin_and_end_with_whole_sentences_and_repeat_the_last_ones(kind: str) -> None:
    text = " ".join(SENTENCES)
    tokenizer = TOKENIZERS[kind]
    one = len(tokenizer.encode(SENTENCES[10], add_special_tokens=False).ids)
    chunk_settings = ChunkSettings(length=4 * one + 8, overlap=one + 3)
    chunks = list(cut(0, "", text, tokenizer=tokenizer, settings=chunk_settings))
    assert len(chunks) > 4
    for chunk in chunks:
        stretch = text[chunk.start : chunk.end]
        assert stretch.startswith("Sentence")
        assert stretch.endswith(".")
    for before, after in pairwise(chunks):
        assert text[after.start : before.end] in SENTENCES, "one sentence is in both"


def test_without_overlap_the_chunks_follow_on_each_other() -> None:
    text = " ".join(SENTENCES)
    chunk_settings = ChunkSettings(length=40, overlap=0)
    chunks = list(
        cut(0, "Title", text, tokenizer=TOKENIZERS["word pieces"], settings=chunk_settings)
    )
    assert " ".join(text[c.start : c.end] for c in chunks) == text


def test_a_long_title_takes_its_part_and_no_more() -> None:
    tokenizer = TOKENIZERS["word pieces"]
    chunk_settings = ChunkSettings(length=32, overlap=4)
    title = short_title(" ".join(["long"] * 100), tokenizer, chunk_settings)
    assert 1 <= len(tokenizer.encode(title, add_special_tokens=False).ids) <= 8
    assert short_title("Tide", tokenizer, chunk_settings) == "Tide"


def test_a_text_that_is_nothing_to_the_tokenizer_is_one_chunk() -> None:
    [chunk] = cut(0, "", "\x00\x01", tokenizer=TOKENIZERS["word pieces"], settings=ChunkSettings())
    assert (chunk.start, chunk.end) == (0, 2)


def test_a_title_is_read_without_the_underscores_of_an_address() -> None:
    assert titled("Super_Bowl_50", "It was played.") == "Super Bowl 50: It was played."
    assert titled("", "It was played.") == "It was played."


@pytest.mark.parametrize(
    ("given_settings", "line"),
    [
        ({"length": 15}, "chunks.length: 15 is not between 16 and 8192"),
        ({"overlap": -1}, "chunks.overlap: -1 is negative"),
        ({"length": 64, "overlap": 64}, "64 is more than half .* try --chunks.overlap 8"),
    ],
)
def test_a_wrong_setting_is_one_line(given_settings: dict[str, int], line: str) -> None:
    with pytest.raises(UserError, match=line):
        ChunkSettings(**given_settings)


def test_no_two_chunks_begin_in_the_middle_of_one_character() -> None:
    # Three tokens a character: the overlap of four begins within one.
    chunk_settings = ChunkSettings(length=16, overlap=4)
    text = "\u6d77\u3002 \u6d77\u3002"
    tokenizer = TOKENIZERS["bytes"]
    chunks = list(cut(0, "The The", text, tokenizer=tokenizer, settings=chunk_settings))
    assert len({chunk.start for chunk in chunks}) == len(chunks) == 2
