"""What is exported from a sharded run is what its processes hold together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests import ranks
from tests.conftest import read_metrics
from tests.models import write_tied_model

STRATEGIES = ("zero3", "fsdp2")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small model with tied embeddings, which are hardest to shard.

    Its matrices have just over 100,000 numbers, from where on ZeRO-3 splits them.
    """
    folder = tmp_path_factory.mktemp("model")
    return write_tied_model(
        folder,
        vocab_size=401,
        hidden_size=250,
        intermediate_size=403,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )


@pytest.fixture(scope="module")
def runs(
    model_folder: Path, clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return a run of two processes under each strategy that splits weights, stopped and resumed.

    Beside each run folder lies the file of the weights that its processes hold.
    """
    found = {}
    for accel in STRATEGIES:
        found[accel] = tmp_path_factory.mktemp(accel) / "run"
        words = ["tests.real.train.worker_export", str(model_folder), str(found[accel])]
        words.append(str(found[accel].with_name("gathered")))
        done = ranks.run(accel, 2, *words, environment=clean_environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "resuming from step-00000004" in done.stdout
    return found


def exported_weights(run: Path) -> dict[str, torch.Tensor]:
    exported = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    return exported.state_dict()


@pytest.mark.computes(2)
@pytest.mark.parametrize("accel", STRATEGIES)
def test_the_export_of_a_run_with_split_weights_is_what_its_processes_hold_together(
    runs: dict[str, Path], accel: str
) -> None:
    name, gathered = torch.load(runs[accel].with_name("gathered"))
    assert name == accel
    # Named as in the loss module that is wrapped; a tied head may come by its own name or not.
    weights = {f"model.{key}": weight for key, weight in exported_weights(runs[accel]).items()}
    assert weights.keys() - {"model.lm_head.weight"} <= gathered.keys() <= weights.keys()
    for key, weight in gathered.items():
        assert torch.equal(weights[key], weight), key
    assert len(AutoTokenizer.from_pretrained(runs[accel] / "export")) <= 401


def test_runs_with_split_weights_agree_after_a_stop_and_were_trained(
    runs: dict[str, Path], model_folder: Path
) -> None:
    start = LlamaForCausalLM.from_pretrained(model_folder).state_dict()
    zero3, fsdp2 = (exported_weights(runs[accel]) for accel in STRATEGIES)
    for key, weight in zero3.items():
        assert not torch.equal(weight, start[key]), key
        # Gradients are summed in another order; AdamW's steps are of 3e-3.
        torch.testing.assert_close(weight, fsdp2[key], rtol=0, atol=1e-5)
    for run in runs.values():
        lines = read_metrics(run)
        assert lines[-1]["validation_loss"] < lines[0]["validation_loss"] - 0.05
