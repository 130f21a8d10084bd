"""Features of a frozen encoder: computed once, kept whole, computed again where they must be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertModel, PreTrainedModel

from train.engine import encoders, signals
from train.labs.imdb import features
from train.labs.imdb.features import cached_features, embed_together

CPU = torch.device("cpu")
# 21 rows of 3 to 12 tokens: 3 files of 8 rows, the last one short.
ROWS = [[2 + (7 * i + j) % 90 for j in range(3 + i * 5 % 10)] for i in range(21)]


@pytest.fixture
def encoder(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    monkeypatch.setattr(features, "ROWS_PER_FILE", 8)
    monkeypatch.setattr(features, "BATCH_SIZE", 2)
    torch.manual_seed(1)
    # With dropout, which features must not have.
    shape = encoders.tiny_shape(100)
    shape.hidden_dropout_prob = 0.5
    return BertModel(shape, add_pooling_layer=False).train()


@pytest.fixture
def embedded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of rows whenever some go through the encoder."""
    counts: list[int] = []
    embed_all = encoders.embed_all

    def counting(model, rows, **options):  # type: ignore[no-untyped-def]
        counts.append(len(rows))
        return embed_all(model, rows, **options)

    monkeypatch.setattr(encoders, "embed_all", counting)
    return counts


def found(folder: Path, encoder: PreTrainedModel, rows: list[list[int]] = ROWS) -> torch.Tensor:
    vectors = cached_features(folder, encoder, rows, device=CPU)
    assert vectors is not None
    return vectors


def test_vectors_come_in_the_order_of_the_rows_without_dropout(encoder: PreTrainedModel) -> None:
    vectors = embed_together(encoder, ROWS, device=CPU)
    assert vectors is not None
    encoder.eval()
    for row, vector in zip(ROWS, vectors, strict=True):
        alone = encoders.embed(encoder, *encoders.pad([row]))[0]
        torch.testing.assert_close(vector, alone, rtol=0, atol=1e-5)


def test_features_are_computed_once_and_found_again_to_the_bit(
    encoder: PreTrainedModel, embedded_rows: list[int], tmp_path: Path
) -> None:
    first = found(tmp_path / "f", encoder)
    assert sum(embedded_rows) == len(ROWS)
    assert torch.equal(found(tmp_path / "f", encoder), first)
    assert sum(embedded_rows) == len(ROWS)
    assert not list((tmp_path / "f").glob(".*"))


def test_a_stop_keeps_the_files_so_far(
    encoder: PreTrainedModel,
    embedded_rows: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = found(tmp_path / "whole", encoder)
    embedded_rows.clear()
    with monkeypatch.context() as patch:
        # Within the second file: the first is 8 rows, and there is a look every 8.
        patch.setattr(signals, "received", lambda: "SIGTERM" if sum(embedded_rows) >= 8 else None)
        assert cached_features(tmp_path / "f", encoder, ROWS, device=CPU) is None
    assert [path.name for path in (tmp_path / "f").glob("rows-*")] == ["rows-00000000.safetensors"]
    assert torch.equal(found(tmp_path / "f", encoder), whole)
    assert sum(embedded_rows) == len(ROWS)


def test_a_damaged_file_is_said_and_computed_again(
    encoder: PreTrainedModel,
    embedded_rows: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = found(tmp_path, encoder)
    file = tmp_path / "rows-00000008.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (tmp_path / "rows-00000016.safetensors").unlink()
    embedded_rows.clear()
    assert torch.equal(found(tmp_path, encoder), first)
    assert sum(embedded_rows) == len(ROWS) - 8
    assert (
        "rows-00000008.safetensors, rows-00000016.safetensors is damaged" in capsys.readouterr().out
    )


def test_features_of_other_rows_or_another_encoder_are_not_taken(
    encoder: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found(tmp_path, encoder)
    shorter = [row[:3] for row in ROWS]
    vectors = found(tmp_path, encoder, shorter)
    assert "made with another rows; computing the features again" in capsys.readouterr().out
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.5)
    assert not torch.equal(found(tmp_path, encoder, shorter), vectors)
    assert "made with another encoder; computing" in capsys.readouterr().out
    (tmp_path / "manifest.json").write_text("{")
    found(tmp_path, encoder, shorter)
    assert "manifest.json cannot be read; computing" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "manifest.json").read_text())["files"]) == 3
