"""batches.py: packed text, its blocks, and the order that a seed and an epoch make of them."""

from __future__ import annotations

import errno
import json
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from runfolder.errors import UserError
from train.engine.batches import Blocks, block_at, pack, permute
from train.engine.data import Piece
from train.engine.tokenization import LoadedTokenizer

BOS, EOS = 1, 2


def letters(*, bos: int | None = BOS, eos: int | None = EOS, first_id: int = 3) -> LoadedTokenizer:
    """Return a tokenizer that gives each character of a small alphabet its own id."""
    ids = {"?": 0} | {letter: first_id + i for i, letter in enumerate("abcdefgh \n")}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return LoadedTokenizer(tokenizer, bos, eos)


def document(text: str) -> Piece:
    return Piece(text, starts=True, ends=True)


def tokens_of(folder: Path) -> list[int]:
    meta = json.loads((folder / "meta.json").read_text())
    found: list[int] = np.fromfile(folder / "tokens.bin", dtype=meta["dtype"]).tolist()
    return found


def packed(folder: Path, tokens: list[int]) -> Path:
    """Write packed text of these tokens."""
    folder.mkdir(exist_ok=True)
    np.asarray(tokens, dtype=np.uint16).tofile(folder / "tokens.bin")
    meta = {"format": 1, "dtype": "uint16", "num_tokens": len(tokens), "num_documents": 1}
    meta |= {"num_bytes": 4 * len(tokens), "vocab_size": 2**16}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


# ---- packing ----


def test_documents_lie_one_after_the_other_each_between_bos_and_eos(tmp_path: Path) -> None:
    # The second document comes in three pieces.
    parts = [Piece("b", starts=True, ends=False), Piece("c", starts=False, ends=False)]
    pieces = [document("ab"), *parts, Piece("d", starts=False, ends=True), document("?")]
    found = pack(pieces, letters(), tmp_path, "it")
    assert tokens_of(tmp_path) == [BOS, 3, 4, EOS, BOS, 4, 5, 6, EOS, BOS, 0, EOS]
    assert (found.num_tokens, found.num_documents, found.num_bytes) == (12, 3, 6)


def test_a_tokenizer_without_bos_or_eos_frames_nothing(tmp_path: Path) -> None:
    pack([document("ab"), document("c")], letters(bos=None, eos=None), tmp_path, "it")
    assert tokens_of(tmp_path) == [3, 4, 5]


@given(st.lists(st.text("abcdefgh \n", min_size=1), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_every_character_of_every_document_is_there_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    pieces = [document(text) for text in texts]
    if not "".join(texts).strip():
        with pytest.raises(UserError, match=r"^it holds no text, or only white space"):
            pack(pieces, letters(), folder, "it")
        return
    meta = pack(pieces, letters(), folder, "it")
    expected = [[BOS, *("abcdefgh \n".index(c) + 3 for c in text), EOS] for text in texts]
    assert tokens_of(folder) == [token for tokens in expected for token in tokens]
    assert meta.num_bytes == len("".join(texts))


@pytest.mark.parametrize(("first_id", "dtype"), [(2**16 - 10, "uint16"), (2**16 - 9, "uint32")])
def test_the_largest_id_fits_into_the_stored_type(
    tmp_path: Path, first_id: int, dtype: str
) -> None:
    assert pack([document("a\n")], letters(first_id=first_id), tmp_path, "it").dtype == dtype
    assert tokens_of(tmp_path) == [BOS, first_id, first_id + 9, EOS]


@pytest.mark.parametrize("texts", [[], [""], [" \n"]])
def test_no_text_is_refused_with_its_source(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match=r"^data.train: x.txt holds no text"):
        pack([document(text) for text in texts], letters(), tmp_path, "data.train: x.txt")


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    def endless(pieces: int) -> Iterator[Piece]:
        for _ in range(pieces):
            yield document("abcdefgh" * 512)

    def peak(pieces: int) -> int:
        tracemalloc.start()
        try:
            pack(endless(pieces), letters(), tmp_path, "it")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(400) < 1.2 * peak(40)


def test_a_disk_that_is_full_is_an_error_of_the_disk(tmp_path: Path) -> None:
    # A limit on the size of files stands in for the disk.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            pack([document("abcdefgh" * 5000)], letters(), tmp_path, "it")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG


# ---- blocks ----


@given(st.integers(2, 200), st.integers(1, 40))
@settings(deadline=None)
def test_every_token_but_the_first_is_a_target_once_with_the_one_before_as_its_input(
    tmp_path_factory: pytest.TempPathFactory, num_tokens: int, length: int
) -> None:
    folder = packed(tmp_path_factory.getbasetemp() / "packed", list(range(num_tokens)))
    blocks = Blocks(folder, length)
    inputs, labels = blocks.rows(list(range(blocks.num_all)))
    assert inputs.shape == labels.shape == (blocks.num_all, length)
    assert inputs.dtype == labels.dtype == np.int64
    targets = labels != -100
    assert labels[targets].tolist() == list(range(1, num_tokens))
    assert inputs[targets].tolist() == list(range(num_tokens - 1))
    # Training reads the full blocks: all but the tail.
    assert blocks.num_full == (num_tokens - 1) // length
    assert targets[: blocks.num_full].all()


def test_a_row_past_the_end_has_no_targets(tmp_path: Path) -> None:
    blocks = Blocks(packed(tmp_path, [1, 2, 3, 4, 5]), 2)
    inputs, labels = blocks.rows([1, blocks.num_all, 1000])
    assert labels.tolist() == [[4, 5], [-100, -100], [-100, -100]]
    assert inputs.tolist() == [[3, 4], [0, 0], [0, 0]]


def test_packed_text_that_is_damaged_is_refused_with_its_folder(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(UserError) as raised:
            Blocks(tmp_path, 2)
        return str(raised.value)

    packed(tmp_path, [1, 2, 3])
    (tmp_path / "tokens.bin").write_bytes(b"\x00\x00")
    assert refusal().startswith(f"{tmp_path}: tokens.bin holds 1 tokens but meta.json says 3")
    for damage in (b"", b"\x00"):
        (tmp_path / "tokens.bin").write_bytes(damage)
        assert refusal().startswith(f"{tmp_path}: is not packed text")
    packed(tmp_path, [1, 2, 3])
    for text in ("", "{}", "[1]", '{"format": 1}'):
        (tmp_path / "meta.json").write_text(text)
        assert refusal().startswith(f"{tmp_path}: is not packed text")


# ---- the order ----


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_the_order_is_a_permutation_for_any_size_and_key(size: int, key: int) -> None:
    assert sorted(permute(i, size=size, key=key) for i in range(size)) == list(range(size))


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_a_place_in_a_large_order_is_found_without_making_the_order(
    size: int, key: int, data: st.DataObject
) -> None:
    tracemalloc.start()
    try:
        assert 0 <= permute(data.draw(st.integers(0, size - 1)), size=size, key=key) < size
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_each_epoch_reads_every_block_once(num_blocks: int, seed: int) -> None:
    order = [block_at(p, num_blocks=num_blocks, seed=seed) for p in range(3 * num_blocks)]
    epochs = [order[i * num_blocks : (i + 1) * num_blocks] for i in range(3)]
    assert all(sorted(epoch) == list(range(num_blocks)) for epoch in epochs)
    # By chance alone two orders of 20 blocks are the same once in 10^18.
    if num_blocks >= 20:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@given(st.integers(0, 2**32 - 2))
def test_neighbouring_seeds_give_orders_that_have_nothing_in_common(seed: int) -> None:
    # With the epoch merely added to the seed, one run's second epoch would be another's first.
    first = [block_at(100 + p, num_blocks=100, seed=seed) for p in range(100)]
    second = [block_at(p, num_blocks=100, seed=seed + 1) for p in range(100)]
    assert first != second
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20


@pytest.mark.parametrize("size", [2, 3, 5, 16, 100])
def test_every_block_comes_to_every_place_about_equally_often(size: int) -> None:
    # Chi-square of the block read first, and last, over many epochs; the limit is that of
    # 5 standard deviations for size - 1 degrees of freedom.
    epochs = 200 * size
    for place in (0, size - 1):
        counts = [0] * size
        for epoch in range(epochs):
            counts[block_at(epoch * size + place, num_blocks=size, seed=42)] += 1
        chi_square = sum((count - 200) ** 2 / 200 for count in counts)
        assert chi_square < size - 1 + 5 * (2 * (size - 1)) ** 0.5


def test_the_order_of_a_seed_never_changes() -> None:
    # A checkpoint holds a position alone: another order would make its run another run.
    order = [block_at(p, num_blocks=10, seed=42) for p in range(20)]
    assert order[:10] == [
        4,
        5,
        9,
        2,
        1,
        8,
        3,
        0,
        7,
        6,
    ]
    assert order[10:] == [0, 4, 8, 6, 3, 2, 1, 5, 7, 9]
