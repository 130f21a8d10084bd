"""pooling.py: an encoder's vectors are what its sentence-transformers files say, or it is refused.

The files are as version 6.2.0 of that library writes them, and as older ones did; its own vectors
were compared with ours once (docs/log.md), by hand here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from runfolder.errors import UserError
from train.engine import encoders, pooling, tokenization
from train.engine.data import Piece
from train.labs.rag.embedder import Embedder

TEXTS = ["The rain came down.", "She won the last race of the long, cold season.", "No rain."]
PROMPTS = {"query": "search: ", "document": "text: "}
OLDER = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An encoder's folder without a word about pooling."""
    pieces = (Piece(text, starts=True, ends=True) for text in (*TEXTS, *PROMPTS.values()))
    tokenization.train(pieces, 300, tmp_path, "the texts")
    torch.manual_seed(5)
    shape = encoders.tiny_shape(tokenization.load(tmp_path).vocab_size)
    BertModel(shape, add_pooling_layer=False).save_pretrained(tmp_path)
    return tmp_path


def describe(folder: Path, settings: dict[str, Any], *more: str, **files: Any) -> None:
    kinds = ("base.modules.transformer.Transformer", "modules.pooling.Pooling", *more)
    modules = [
        {"idx": i, "name": str(i), "path": "1_Pooling" if i == 1 else "", "type": f"st.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(settings))
    (folder / "modules.json").write_text(json.dumps(modules))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("prompts", [{}, PROMPTS])
@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("mean", {"pooling_mode": "mean", "include_prompt": True}),
        ("cls", {"pooling_mode": "cls", "embedding_dimension": 64}),
        ("mean", OLDER | {"pooling_mode_mean_tokens": True}),
        ("cls", OLDER | {"pooling_mode_cls_token": True, "include_prompt": True}),
    ],
)
def test_a_vector_is_pooled_and_prompted_as_the_folder_says(
    folder: Path, mode: str, settings: dict[str, Any], prompts: dict[str, str]
) -> None:
    describe(
        folder,
        settings,
        "modules.normalize.Normalize",
        config_sentence_transformers={"prompts": prompts, "default_prompt_name": None},
        sentence_bert_config={"max_seq_length": 40, "do_lower_case": False},
    )
    model = encoders.load(folder, folder, 1)
    embedder = Embedder(model, folder, 24, torch.device("cpu"))
    plain = tokenization.load(folder).tokenizer
    for found, prompt in (
        (embedder.queries(TEXTS), prompts.get("query", "")),
        (embedder.documents(TEXTS), prompts.get("document", "")),
    ):
        for vector, text in zip(found, TEXTS, strict=True):
            with torch.no_grad():
                hidden_TD = model(torch.tensor([plain.encode(prompt + text).ids]))[0][0]
            expected = hidden_TD.mean(0) if mode == "mean" else hidden_TD[0]
            torch.testing.assert_close(torch.from_numpy(vector), expected / expected.norm())
    assert pooling.read(folder).max_length == 40


@pytest.mark.parametrize(
    ("settings", "more", "named"),
    [
        ({"pooling_mode": "mean"}, ["modules.Dense"], "Dense"),
        ({"pooling_mode": "max"}, [], "max"),
        ({"pooling_mode": "lasttoken"}, [], "lasttoken"),
        ({"pooling_mode": "cls+mean"}, [], "cls+mean"),
        (OLDER | {"pooling_mode_weightedmean_tokens": True}, [], "weightedmean"),
        (dict.fromkeys(OLDER, True), [], "cls_token, pooling_mode_mean_tokens"),
        ({"pooling_mode": "mean", "include_prompt": False}, [], "include_prompt: false"),
        ({}, [], "none"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(
    folder: Path, settings: dict[str, Any], more: list[str], named: str
) -> None:
    describe(folder, settings, *more)
    with pytest.raises(UserError) as raised:
        pooling.read(folder)
    assert "asks for" in str(raised.value) and named in str(raised.value)


def test_a_folder_that_says_nothing_is_pooled_by_the_mean(folder: Path) -> None:
    assert pooling.read(folder) == pooling.Pooling(mode="mean")


def test_a_prompt_takes_its_room_from_the_chunks(folder: Path) -> None:
    prompts = {"query": "search: " * 20, "document": "text: "}
    describe(folder, {"pooling_mode": "mean"}, config_sentence_transformers={"prompts": prompts})
    expected = len(tokenization.load(folder).tokenizer.encode("search: " * 20).ids)
    assert pooling.prompt_tokens(folder, folder) == expected > 20
    assert pooling.prompt_tokens(None, folder) == 0


def test_what_the_labs_do_not_do_for_an_encoder_is_refused(folder: Path) -> None:
    said = {"prompts": {"first": "topic: "}, "default_prompt_name": "first"}
    describe(folder, {"pooling_mode": "mean"}, config_sentence_transformers=said)
    with pytest.raises(UserError, match="needs 'topic: ' before every text"):
        pooling.check_plain(folder)
    pooling.check_compared(folder)
    said = {"similarity_fn_name": "dot"}
    describe(folder, {"pooling_mode": "mean"}, config_sentence_transformers=said)
    pooling.check_plain(folder)
    with pytest.raises(UserError, match="asks for the similarity dot"):
        pooling.check_compared(folder)
    # Of vectors of length one the two are the same.
    describe(folder, {"pooling_mode": "mean"}, "modules.Normalize")
    pooling.check_compared(folder)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_the_length_is_read_from_the_file_of_every_kind(folder: Path, kind: str) -> None:
    describe(folder, {"pooling_mode": "mean"})
    (folder / f"sentence_{kind}_config.json").write_text('{"max_seq_length": 17}')
    assert pooling.read(folder).max_length == 17
    (folder / f"sentence_{kind}_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(UserError, match=f"sentence_{kind}_config.json asks for do_lower_case"):
        pooling.read(folder)
