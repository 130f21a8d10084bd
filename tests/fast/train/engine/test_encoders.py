from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from runfolder.errors import UserError
from train.engine import encoders, tokenization
from train.engine.data import Piece

TEXTS = ["The rain came down.", "A", "She won the last race of the long, cold season.", "No rain."]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    pieces = (Piece(text, starts=True, ends=True) for text in TEXTS)
    tokenization.train(pieces, 300, folder, "the texts")
    return folder


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path) -> BertModel:
    model = encoders.load(None, tokenizer_folder, seed=3)
    assert isinstance(model, BertModel)
    return model


def test_the_mean_leaves_padding_out() -> None:
    hidden_BTD = torch.tensor(
        [[[1.0, 2.0], [3.0, 4.0], [99.0, 99.0]], [[5.0, 6.0], [0, 0], [0, 0]]]
    )
    mask_BT = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert encoders.mean_pool(hidden_BTD, mask_BT).tolist() == [[2.0, 3.0], [5.0, 6.0]]


def test_padding_is_as_wide_as_the_longest_row() -> None:
    ids, mask = encoders.pad([[5, 6, 7], [8]], pad_id=1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_vectors_are_in_the_order_of_the_texts_and_do_not_depend_on_the_batch(
    model: BertModel, tokenizer_folder: Path
) -> None:
    rows = encoders.tokenize(tokenizer_folder, TEXTS, 64)
    model.train()
    device = torch.device("cpu")
    alone = encoders.embed_all(model, rows, batch_size=1, device=device)
    assert alone.shape == (4, 64)
    torch.testing.assert_close(
        encoders.embed_all(model, rows, batch_size=3, device=device), alone, atol=1e-5, rtol=1e-5
    )
    assert model.training
    for row, vector in zip(rows, alone, strict=True):
        with torch.no_grad():
            expected = encoders.embed(model.eval(), *encoders.pad([row]))[0]
        torch.testing.assert_close(vector, expected)


def test_the_same_seed_gives_the_same_weights(model: BertModel, tokenizer_folder: Path) -> None:
    again, other = (encoders.load(None, tokenizer_folder, seed) for seed in (3, 4))
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_texts_are_cut_to_the_length_and_to_the_positions_of_the_model(
    model: BertModel, tokenizer_folder: Path
) -> None:
    whole = encoders.tokenize(tokenizer_folder, TEXTS, 100)
    cut = encoders.tokenize(tokenizer_folder, TEXTS, 4)
    assert cut == [row[:4] for row in whole]
    assert (encoders.max_length(model, 128), encoders.max_length(model, 999)) == (128, 256)
    shape = RobertaConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=66,
        pad_token_id=1,
    )
    # Its positions begin after the padding's id.
    assert encoders.max_length(RobertaModel(shape), 999) == 64


def test_weights_of_half_precision_are_read_in_full(
    model: BertModel, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model.half().save_pretrained(tmp_path)
    model.float()
    loaded = encoders.load(tmp_path, tokenizer_folder, seed=1)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert getattr(loaded, "pooler", None) is None


def test_a_folder_that_is_no_encoder_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.name: .* holds no config.json"):
        encoders.load(tmp_path, tokenizer_folder, seed=1)
    small = BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    BertModel(small).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has \d+ tokens, but its embedding has only 50"):
        encoders.load(tmp_path, tokenizer_folder, seed=1)
