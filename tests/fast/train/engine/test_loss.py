"""The loss: the same however a batch is cut, and an evaluation that counts every token once."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from torch import nn

from train import tinyllama
from train.engine import batches, loss, models
from train.engine.batches import Blocks
from train.engine.data import Piece
from train.engine.loss import TokenLoss, evaluate, global_target_tokens
from train.engine.once import staged_path
from train.engine.tokenization import LoadedTokenizer

# fp32 sums of some thousand terms, taken in another order.
SAME = 1e-6


@pytest.fixture
def token_loss(config: tinyllama.Config, device: torch.device) -> TokenLoss:
    """Return the preset `tiny` with its loss."""
    assert config.staged is not None
    built = models.build(config, staged_path(config.staged.tokenizer), seed=1)
    return TokenLoss(built, device, bf16=False)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return eight sequences of 16 tokens, each with another number of targets."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 512, (8, 17), generator=generator)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    for row in range(8):
        labels[row, 2 * row + 1 :] = -100
    return inputs, labels


def gradients(
    token_loss: TokenLoss, parts: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of a step over micro batches, as the training loop takes them."""
    token_loss.zero_grad()
    tokens = global_target_tokens((labels for _, labels in parts), torch.device("cpu"))
    total = 0.0
    for inputs, labels in parts:
        scaled = token_loss(inputs, labels) * (1 / tokens).float()
        scaled.backward()
        total += float(scaled.detach())
    found = {n: p.grad.clone() for n, p in token_loss.named_parameters() if p.grad is not None}
    return total, found


def test_eight_micro_batches_of_one_equal_one_of_eight(
    token_loss: TokenLoss, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    inputs, labels = batch
    whole, whole_gradients = gradients(token_loss, [(inputs, labels)])
    for size in (1, 2, 3):
        cut = list(zip(inputs.split(size), labels.split(size), strict=True))
        parts, parts_gradients = gradients(token_loss, cut)
        assert parts == pytest.approx(whole, rel=SAME)
        assert parts_gradients.keys() == whole_gradients.keys()
        for name, gradient in whole_gradients.items():
            torch.testing.assert_close(parts_gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens_not_over_its_parts(
    token_loss: TokenLoss, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    inputs, labels = batch
    found, _ = gradients(token_loss, list(zip(inputs.split(1), labels.split(1), strict=True)))
    with torch.no_grad():
        logits = token_loss.model(input_ids=inputs).logits.double()
    each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    counted = (labels != -100).sum()
    assert counted == 1 + 3 + 5 + 7 + 9 + 11 + 13 + 15
    assert found == pytest.approx(float(each.sum() / counted), rel=SAME)
    means = [
        float(row.sum() / (label != -100).sum()) for row, label in zip(each, labels, strict=True)
    ]
    assert sum(means) / 8 != pytest.approx(found, rel=1e-4), "the parts are too alike to tell"


def test_ignored_targets_count_nothing_and_have_no_gradient(
    token_loss: TokenLoss, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    inputs, labels = batch
    ignored = torch.full_like(labels, -100)
    nothing = token_loss(inputs, ignored)
    assert nothing.item() == 0.0
    nothing.backward()
    assert all(not p.grad.any() for p in token_loss.parameters() if p.grad is not None)
    padded = torch.cat([inputs, inputs]), torch.cat([labels, ignored])
    cpu = torch.device("cpu")
    assert float(global_target_tokens([padded[1]], cpu)) == 64
    assert float(global_target_tokens([labels, labels], cpu)) == 128
    with torch.no_grad():
        found = float(token_loss(*padded))
        assert found == pytest.approx(float(token_loss(inputs, labels)), rel=SAME)


def test_the_loss_is_fp32_under_bf16_and_near_that_of_fp32(
    token_loss: TokenLoss, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    half = TokenLoss(token_loss.model, torch.device("cpu"), bf16=True)
    with torch.no_grad():
        exact, rough = token_loss(*batch), half(*batch)
    assert rough.dtype == torch.float32
    assert rough != exact
    assert float(rough) == pytest.approx(float(exact), rel=1e-3)


# ---- evaluation ----


def one_shot(token_loss: TokenLoss, blocks: Blocks, num_blocks: int) -> tuple[float, int]:
    """Return the summed loss in nats and the targets of the first blocks, each by itself."""
    tokens = torch.from_numpy(blocks._tokens.astype("int64"))
    length = blocks.sequence_length
    nats, count = 0.0, 0
    for index in range(num_blocks):
        part = tokens[index * length : index * length + length + 1]
        with torch.no_grad():
            logits = token_loss.model(input_ids=part[None, :-1]).logits[0].double()
        nats += float(nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
        count += len(part) - 1
    return nats, count


@pytest.mark.parametrize("length", [50, 128])
def test_an_evaluation_scores_every_token_once_at_sizes_that_do_not_divide(
    token_loss: TokenLoss, config: tinyllama.Config, device: torch.device, length: int
) -> None:
    assert config.staged is not None
    blocks = Blocks(staged_path(config.staged.validation), length)
    targets = blocks.packed.num_tokens - 1
    assert targets % length, "the last block is to be short"
    nats, count = one_shot(token_loss, blocks, blocks.num_all)
    assert count == targets
    uneven = [size for size in range(2, 20) if blocks.num_all % size]
    for micro_batch_size in (1, uneven[0], uneven[-1], 1000):
        found = evaluate(
            token_loss, blocks, micro_batch_size=micro_batch_size, max_tokens=None, device=device
        )
        assert found is not None
        assert found.num_tokens == targets
        assert found.loss == pytest.approx(nats / targets, rel=SAME)
        assert found.bits_per_byte == pytest.approx(
            nats / math.log(2) / blocks.packed.num_bytes, rel=SAME
        )


@pytest.mark.parametrize(("max_tokens", "num_blocks"), [(1, 1), (64, 1), (65, 2), (500, 8)])
def test_an_evaluation_of_a_part_scores_the_blocks_that_it_reaches_into(
    token_loss: TokenLoss,
    config: tinyllama.Config,
    device: torch.device,
    max_tokens: int,
    num_blocks: int,
) -> None:
    assert config.staged is not None
    blocks = Blocks(staged_path(config.staged.validation), 64)
    nats, count = one_shot(token_loss, blocks, num_blocks)
    for micro_batch_size in (1, 3, 1000):
        found = evaluate(
            token_loss,
            blocks,
            micro_batch_size=micro_batch_size,
            max_tokens=max_tokens,
            device=device,
        )
        assert found is not None
        assert found.num_tokens == count
        assert found.loss == pytest.approx(nats / count, rel=SAME)


class Uniform(nn.Module):
    """Stands for a model that thinks every one of `vocab_size` tokens equally likely."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocab_size))


def test_perplexity_and_bits_per_byte_are_what_is_computed_by_hand(
    device: torch.device, tmp_path: Path
) -> None:
    # Four tokens, one a character, of one, two, three and four bytes in UTF-8.
    vocabulary = {"a": 0, "é": 1, "€": 2, "😀": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    text = "aé€😀" * 5 + "a"
    pieces = [Piece(text, starts=True, ends=True)]
    packed = batches.pack(pieces, LoadedTokenizer(tokenizer, None, None), tmp_path, "the test")
    assert (packed.num_tokens, packed.num_bytes) == (21, 51)
    module: Any = TokenLoss(Uniform(4), device, bf16=False)  # type: ignore[arg-type]
    blocks = Blocks(tmp_path, 6)
    found = evaluate(module, blocks, micro_batch_size=2, max_tokens=None, device=device)
    assert found is not None
    # 20 targets at log2(4) = 2 bits each, over the 51 bytes of the text.
    assert found.num_tokens == 20
    assert found.loss == pytest.approx(math.log(4))
    assert found.perplexity == pytest.approx(4)
    assert found.bits_per_byte == pytest.approx(20 * 2 / 51)
    # Of a part, the bytes are its share of the tokens: 2 bits over 51 / 20 bytes.
    found = evaluate(module, blocks, micro_batch_size=2, max_tokens=6, device=device)
    assert found is not None
    assert found.num_tokens == 6
    assert found.bits_per_byte == pytest.approx(2 / (51 / 20))


def test_a_perplexity_beyond_floats_is_infinite_and_no_error(
    token_loss: TokenLoss, config: tinyllama.Config, device: torch.device
) -> None:
    assert config.staged is not None
    with torch.no_grad():
        token_loss.model.get_output_embeddings().weight.mul_(1e6)
    blocks = Blocks(staged_path(config.staged.validation), 64)
    found = evaluate(token_loss, blocks, micro_batch_size=8, max_tokens=64, device=device)
    assert found is not None
    assert 709 < found.loss < math.inf
    assert found.perplexity == math.inf


@pytest.mark.parametrize("asked", [False, True])
def test_an_evaluation_ends_early_only_when_the_run_is_asked_to_stop(
    token_loss: TokenLoss,
    config: tinyllama.Config,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    asked: bool,
) -> None:
    assert config.staged is not None
    blocks = Blocks(staged_path(config.staged.validation), 16)
    training_during: list[bool] = []
    token_loss.register_forward_pre_hook(lambda m, _: training_during.append(m.training))
    monkeypatch.setattr(loss.signals, "received", lambda: "SIGTERM" if asked else None)
    token_loss.train()
    found = evaluate(token_loss, blocks, micro_batch_size=1, max_tokens=None, device=device)
    assert (found is None) == asked
    assert len(training_during) == (10 if asked else blocks.num_all)
    assert not any(training_during), "dropout would be on"


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_shares_of_several_ranks_make_the_whole(
    token_loss: TokenLoss,
    config: tinyllama.Config,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    num_ranks: int,
) -> None:
    assert config.staged is not None
    blocks = Blocks(staged_path(config.staged.validation), 64)
    nats, count = one_shot(token_loss, blocks, blocks.num_all)
    assert -(-blocks.num_all // 3) % num_ranks, "one rank's last turn is to be past the end"
    shares: list[torch.Tensor] = []
    turns = []
    monkeypatch.setattr(loss, "world_size", lambda: num_ranks)
    monkeypatch.setattr(loss.dist, "all_reduce", lambda total: shares.append(total.clone()))
    for rank in range(num_ranks):
        calls: list[int] = []
        hook = token_loss.register_forward_pre_hook(lambda m, _, calls=calls: calls.append(1))
        monkeypatch.setattr(loss, "rank", lambda rank=rank: rank)
        evaluate(token_loss, blocks, micro_batch_size=3, max_tokens=None, device=device)
        hook.remove()
        turns.append(len(calls))
    assert len(set(turns)) == 1, "a rank would wait in a collective for ever"
    total = torch.stack(shares).sum(0)
    assert float(total[0]) == pytest.approx(nats, rel=SAME)
    assert int(total[1]) == count
