"""The training of a phase: what moves and what does not, and that the batch's split is nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import BertModel

from train.engine import encoders, models
from train.engine.errors import RunFailed
from train.engine.settings import BatchSettings, OptimizerSettings, ScheduleSettings
from train.labs.imdb.phase_training import PhaseTraining, take_step
from train.labs.imdb.transfer import STATISTICS, Classifier
from train.labs.imdb.unfreezing import Phase, UnfreezingSettings

CPU = torch.device("cpu")
ROWS = [[2 + (7 * i + j) % 90 for j in range(3 + i * 5 % 10)] for i in range(11)]
LABELS = [i % 2 for i in range(11)]
BATCH = BatchSettings(global_batch_size=8, micro_batch_size=8)


@pytest.fixture
def model(device: torch.device) -> Classifier:
    torch.manual_seed(1)
    model = Classifier(BertModel(encoders.tiny_shape(100), add_pooling_layer=False), 2)
    # Heads begin at zero, and then the encoder has no gradient in the first step.
    torch.nn.init.normal_(model.head.weight)
    return model


def training_of(model: Classifier, blocks: int) -> PhaseTraining:
    settings = UnfreezingSettings(head_lr=1e-2, block_decay=0.5)
    phase = Phase(first_step=10, steps=20, blocks=blocks)
    return PhaseTraining(model, phase, OptimizerSettings(lr=1e-3), settings, device=CPU, bf16=False)


def steps(training: PhaseTraining, batch: BatchSettings = BATCH, count: int = 2) -> list[float]:
    losses = []
    for step in range(10, 10 + count):
        done = take_step(
            training,
            lambda rows: encoders.pad(ROWS[row] for row in rows),
            LABELS,
            batch,
            ScheduleSettings(),
            step=step,
            seed=3,
            writing=False,
        )
        losses.append(done.loss)
    return losses


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_only_what_is_unfrozen_moves_is_optimized_and_is_saved(
    model: Classifier, blocks: int
) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training = training_of(model, blocks)
    steps(training)
    unfrozen = {id(p) for block in model.blocks()[:blocks] for p in block}
    unfrozen |= {id(model.head.weight), id(model.head.bias)}
    optimized = [p for group in training.optimizer.param_groups for p in group["params"]]
    assert len(optimized) == len(unfrozen)
    for name, parameter in model.named_parameters():
        is_unfrozen = id(parameter) in unfrozen
        # A key's bias has no gradient: it adds the same to all the scores of a query. And rows of
        # the embeddings that no text has do not matter here.
        if not name.endswith("key.bias"):
            assert torch.equal(parameter, before[name]) != is_unfrozen, name
        assert (parameter in set(optimized)) == is_unfrozen, name
    saved = {name for name, _ in training.parameters()}
    assert saved == {n for n, p in model.named_parameters() if id(p) in unfrozen} | set(STATISTICS)
    trainable, total = training.counts()
    assert trainable == sum(p.numel() for p in optimized)
    assert total == sum(p.numel() for n, p in model.named_parameters() if n not in STATISTICS)


def test_the_split_of_a_batch_changes_nothing(model: Classifier) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    for micro_batch_size in (8, 4, 1):
        model.load_state_dict(state)
        batch = replace(BATCH, micro_batch_size=micro_batch_size)
        losses.append(steps(training_of(model, 3), batch, count=4))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx(losses[2], abs=1e-5)
    assert losses[0][0] != losses[0][-1]


def test_deeper_blocks_learn_slower_and_only_what_trains_has_dropout(model: Classifier) -> None:
    training = training_of(model, 2)
    training.start_step(0.1)
    rates = [group["lr"] for group in training.optimizer.param_groups]
    assert sorted(set(rates), reverse=True) == pytest.approx([1e-3, 1e-4, 5e-5])
    assert training.learning_rates() == pytest.approx({"lr": 1e-3, "encoder_lr": 1e-4})
    assert not model.encoder.embeddings.training
    assert all(layer.training for layer in models.layers(model.encoder))
    training = training_of(model, 1)
    training.start_step(1.0)
    assert [layer.training for layer in models.layers(model.encoder)] == [False, True]
    training = training_of(model, 3)
    training.start_step(1.0)
    assert model.encoder.embeddings.training


def test_a_loss_that_is_not_finite_stops_before_the_update(model: Classifier) -> None:
    training = training_of(model, 1)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    before = model.head.weight.detach().clone()
    with pytest.raises(RunFailed, match="the loss of step 11 is not finite"):
        steps(training)
    assert torch.equal(model.head.weight, before)
