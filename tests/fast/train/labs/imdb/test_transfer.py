"""A head on an encoder: what it computes, its blocks, and the folder it becomes."""

from __future__ import annotations

import torch
from transformers import BertModel, DistilBertConfig, DistilBertModel, PreTrainedModel

from train.engine import encoders
from train.labs.imdb.transfer import Classifier, Head


def test_the_folded_head_is_the_same_function_of_vectors_as_they_come() -> None:
    torch.manual_seed(0)
    vectors_ND = torch.randn(50, 8) * torch.arange(1, 9) + 3
    # A dimension that never changes but for its rounding.
    vectors_ND[:, 2] = 7.0
    vectors_ND[::2, 2] += 1e-6
    head = Head(8, 3)
    head.measure(vectors_ND)
    with torch.no_grad():
        head.weight.normal_()
        head.bias.normal_()
        folded = head.folded()
        plain = vectors_ND @ folded["weight"].T + folded["bias"]
        torch.testing.assert_close(head(vectors_ND), plain, rtol=1e-4, atol=1e-4)
    standardised = (vectors_ND - head.mean) / head.deviation
    torch.testing.assert_close(standardised.mean(0), torch.zeros(8), rtol=0, atol=1e-5)
    expected_deviation = torch.ones(8)
    expected_deviation[2] = 0
    deviation = standardised.std(0, correction=0)
    torch.testing.assert_close(deviation, expected_deviation, rtol=0, atol=1e-5)
    assert folded["weight"].abs().max() < 10


def test_every_parameter_of_the_encoder_is_in_one_block_and_the_top_comes_first() -> None:
    shapes: list[PreTrainedModel] = [
        BertModel(encoders.tiny_shape(100), add_pooling_layer=False),
        DistilBertModel(
            DistilBertConfig(vocab_size=90, dim=8, n_layers=3, n_heads=2, hidden_dim=8)
        ),
    ]
    for encoder in shapes:
        model = Classifier(encoder, 2)
        blocks = model.blocks()
        assert len(blocks) == encoder.config.num_hidden_layers + 1
        names = {id(parameter): name for name, parameter in encoder.named_parameters()}
        in_blocks = [names[id(parameter)] for block in blocks for parameter in block]
        assert sorted(in_blocks) == sorted(names.values())
        top = {names[id(parameter)].split("layer.")[1].split(".")[0] for parameter in blocks[0]}
        assert top == {str(encoder.config.num_hidden_layers - 1)}
        assert any("embeddings" in names[id(parameter)] for parameter in blocks[-1])
