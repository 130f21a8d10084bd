from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
)

from runfolder.errors import UserError
from train.engine import encoders, signals, tokenization
from train.engine.data import Piece
from train.labs.ag_news import classifier

TEXTS = ["The rain came down.", "A", "She won the last race of the long, cold season.", "No rain."]
CLASSES = ["dry", "wet", "other"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    pieces = (Piece(text, starts=True, ends=True) for text in TEXTS)
    tokenization.train(pieces, 300, folder, "the texts")
    return folder


@pytest.fixture
def model(tokenizer_folder: Path) -> BertForSequenceClassification:
    model = classifier.load(None, tokenizer_folder, CLASSES, seed=3)
    assert isinstance(model, BertForSequenceClassification)
    return model


def test_probabilities_are_in_the_order_of_the_rows(
    device: torch.device, model: BertForSequenceClassification, tokenizer_folder: Path
) -> None:
    rows = encoders.tokenize(tokenizer_folder, TEXTS, 64)
    model.train()
    found = classifier.predict(model, rows, batch_size=3, device=device)
    assert found is not None
    assert model.training
    assert found.shape == (4, 3)
    for row, probabilities_C in zip(rows, found, strict=True):
        with torch.no_grad():
            expected = model.eval()(input_ids=torch.tensor([row])).logits.softmax(-1)[0]
        assert np.allclose(probabilities_C, expected.numpy(), atol=1e-5)


def test_a_signal_ends_an_evaluation(
    device: torch.device,
    model: BertForSequenceClassification,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = encoders.tokenize(tokenizer_folder, TEXTS, 64) * 10
    calls: list[int] = []
    forward = model.forward

    def counted(*words: object, **more: object) -> object:
        calls.append(1)
        return forward(*words, **more)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(signals, "received", lambda: "SIGTERM" if len(calls) > 2 else None)
    assert classifier.predict(model, rows, batch_size=1, device=device) is None
    assert len(calls) == classifier.LOOK_EVERY < len(rows)


def test_an_export_says_the_names_of_the_classes_and_replaces_an_earlier_one(
    model: BertForSequenceClassification, tokenizer_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "export"
    output.mkdir()
    (output / "stale").touch()
    classifier.export(model, tokenizer_folder, 50, output)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert not (output / "stale").exists()
    again = AutoModelForSequenceClassification.from_pretrained(output)
    assert again.config.id2label == dict(enumerate(CLASSES))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize("classes", [CLASSES, ["one", "more", *CLASSES]])
def test_a_tuned_classifier_gives_its_encoder_and_never_its_head(
    model: BertForSequenceClassification,
    tokenizer_folder: Path,
    tmp_path: Path,
    classes: list[str],
) -> None:
    classifier.export(model, tokenizer_folder, 50, tmp_path / "export")
    one, other = (
        classifier.load(tmp_path / "export", tokenizer_folder, classes, seed) for seed in (9, 10)
    )
    for again in (one, other):
        expected = model.base_model.state_dict()
        found = again.base_model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert again.config.id2label == dict(enumerate(classes))
        assert again.classifier.weight.shape == (len(classes), model.config.hidden_size)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    if len(classes) == len(CLASSES):
        assert not torch.equal(one.classifier.weight, model.classifier.weight)


def test_a_model_without_a_padding_token_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    shape = encoders.tiny_shape(tokenization.load(tokenizer_folder).vocab_size)
    BertModel(shape).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    with pytest.raises(UserError, match=r"has no padding token.*choose an encoder, such as"):
        classifier.load(tmp_path, tokenizer_folder, CLASSES, seed=1)
