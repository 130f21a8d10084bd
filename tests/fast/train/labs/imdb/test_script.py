"""Lab 3: phases, resuming in each of them, what is left behind, and wrong input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from runfolder.checkpoints import published
from runfolder.errors import UserError
from tests.conftest import read_metrics
from tests.shared import CHECKOUT
from train.engine import arguments, signals
from train.engine.checkpoint_reader import find_damage
from train.engine.metrics import Metrics
from train.labs.imdb import script
from train.labs.imdb.settings import Config

SAMPLES = CHECKOUT / "train/samples/imdb"
# Phases of 8, 6 and 6 steps.
SETTINGS = ["--max_steps", "20", "--evaluation.every_steps", "5", "--checkpoint.every_steps", "4"]
SETTINGS += ["--log_every_steps", "1", "--checkpoint.keep", "9"]


def config_of(*words: str) -> Config:
    config = arguments.parse(
        Config, ["--dry_run", *SETTINGS, *words], prog="test", dry_run=script.DRY_RUN
    )
    return script.stage(config, online=False)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function: from then on a run is asked to stop when it has done so many steps."""

    def set_step(step: int) -> None:
        asked: list[int] = []
        # The step that is shown is done; the one that follows is the last.
        monkeypatch.setattr(
            Metrics, "progress", lambda self, shown: asked.append(shown) if shown >= step - 1 else 0
        )
        monkeypatch.setattr(signals, "received", lambda: "SIGUSR1" if asked else None)

    return set_step


def train(config: Config, run_folder: Path, device: torch.device) -> str:
    run_folder.mkdir(exist_ok=True)
    return script.train(config, run_folder, device, rehearse_stop=False)


def outcome_of(run_folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_folder / "attempts/1/outcome.json").read_text())
    return found


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def deterministic(run_folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key != "rows_per_second"}
        for line in read_metrics(run_folder)
    ]


@pytest.fixture(scope="module")
def straight(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a gradual run that was never stopped."""
    run_folder = tmp_path_factory.mktemp("straight")
    assert train(config_of(), run_folder, device) == "finished"
    return run_folder


def test_a_run_stopped_in_each_phase_and_between_two_ends_bit_for_bit_as_one_that_was_not(
    straight: Path,
    device: torch.device,
    tmp_path: Path,
    stop_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # In the head's phase, exactly between it and the next, in the validation of step 10, which
    # then is not scored yet, in the middle of that phase, and at its end.
    for asked, step in ((3, 3), (8, 8), (11, 10), (13, 13), (14, 14)):
        stop_after(asked)
        assert train(config_of(), tmp_path, device) == "stopped"
        newest = published(tmp_path / "checkpoints")[0]
        assert newest.name == f"step-{step:08d}" and find_damage(newest) is None
        assert outcome_of(tmp_path) | {"step": step, "reason": "SIGUSR1"} == outcome_of(tmp_path)
    monkeypatch.undo()
    assert train(config_of(), tmp_path, device) == "finished"

    ours, expected = (tensors(run / "checkpoints/step-00000020") for run in (tmp_path, straight))
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []
    assert deterministic(tmp_path) == deterministic(straight)
    predictions = [(run / "predictions.jsonl").read_bytes() for run in (tmp_path, straight)]
    assert predictions[0] == predictions[1]
    # The first attempt made the features; the second and third found them.
    said = capsys.readouterr().out
    assert said.count("features of 180 of 180 training rows") == 1
    assert said.count("features of 200 rows are ready") == 3


def test_a_run_stopped_in_its_features_saves_and_goes_on(
    straight: Path, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(signals, "received", lambda: "SIGTERM")
        assert train(config_of(), tmp_path, device) == "stopped"
    assert [path.name for path in published(tmp_path / "checkpoints")] == ["step-00000000"]
    assert not (tmp_path / "features").exists()
    assert train(config_of(), tmp_path, device) == "finished"
    assert deterministic(tmp_path) == deterministic(straight)


def test_a_checkpoint_holds_what_has_been_trained_and_nothing_else(straight: Path) -> None:
    def trained(step: int) -> set[str]:
        names = tensors(straight / f"checkpoints/step-{step:08d}")
        return {name.removeprefix("weight/") for name in names if name.startswith("weight/")}

    head = {"head.weight", "head.bias", "head.mean", "head.deviation"}
    assert trained(8) == head
    top = trained(14) - head
    assert top and all(name.startswith("encoder.encoder.layer.1.") for name in top)
    assert trained(20) > trained(14)
    assert "encoder.embeddings.word_embeddings.weight" in trained(20)


def test_the_run_reports_both_classifiers_and_a_line_for_each_test_row(straight: Path) -> None:
    outcome = outcome_of(straight)
    assert outcome["outcome"] == "finished" and outcome["step"] == 20
    for name in ("test", "baseline"):
        for score in ("accuracy", "macro_f1", "roc_auc"):
            assert 0 < outcome["metrics"][f"{name}_{score}"] <= 1
    lines = [json.loads(text) for text in (straight / "predictions.jsonl").read_text().splitlines()]
    rows = [json.loads(text) for text in (SAMPLES / "test.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in rows]
    right = np.mean([line["label"] == line["predicted"] for line in lines])
    assert right == outcome["metrics"]["test_accuracy"]
    scored = [line["step"] for line in read_metrics(straight) if "validation_accuracy" in line]
    assert scored == [0, 5, 8, 10, 14, 15, 20]


def test_the_export_loads_in_the_lines_of_the_chapter(straight: Path) -> None:
    chapter = (CHECKOUT / "docs/lab3-imdb.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", chapter, re.DOTALL)
    texts = [json.loads(line)["text"] for line in (SAMPLES / "test.jsonl").open()]
    predictions = [json.loads(line) for line in (straight / "predictions.jsonl").open()]
    # Each is loaded anew, which is slow.
    for text, expected in list(zip(texts, predictions, strict=True))[::9]:
        scope: dict[str, Any] = {"folder": straight / "export", "text": text}
        exec(code, scope)
        assert scope["answer"] == expected["predicted"]
        sure = float(scope["logits"].detach().softmax(-1).max())
        # There it was padded, so sums were taken in another order.
        assert sure == pytest.approx(max(expected["probabilities"]), abs=1e-5)


@pytest.mark.parametrize("freeze", ["backbone", "none"])
def test_the_other_ways_to_freeze(freeze: str, device: torch.device, tmp_path: Path) -> None:
    config = config_of("--freeze", freeze, "--max_steps", "6", "--export", "false")
    assert train(config, tmp_path, device) == "finished"
    assert (tmp_path / "features").exists() == (freeze == "backbone")
    names = tensors(tmp_path / "checkpoints/step-00000006")
    assert any(name.startswith("weight/encoder.") for name in names) == (freeze == "none")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "7"], "was made with seed 42, not 7"),
        (["--freeze", "none"], "was made with freeze gradual, not none"),
        (["--max_steps", "40"], r"was made with unfreezing.phases \[\[0, 8\]"),
        (["--batch.global_batch_size", "8"], "was made with batch.global_batch_size 16, not 8"),
        (["--data.max_length", "32"], "was made with data.max_length 64, not 32"),
    ],
)
def test_a_run_is_not_continued_with_other_settings(
    words: list[str], message: str, straight: Path, device: torch.device
) -> None:
    with pytest.raises(UserError, match=message):
        train(config_of(*words), straight, device)


def test_another_strategy_is_refused(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(UserError, match="ACCEL=zero2: the lab imdb teaches ddp; leave ACCEL out"):
        train(config_of(), tmp_path, device)
    assert not (tmp_path / "checkpoints").exists()


def rows_file(folder: Path, *lines: str) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


GOOD = ['{"text": "good", "label": "pos"}', '{"text": "bad", "label": "neg"}'] * 2


@pytest.mark.parametrize(
    ("lines", "words", "message"),
    [
        (GOOD, ["--freeze", "everything"], "freeze: 'everything' is not one of backbone, none"),
        (GOOD, ["--freze", "none"], "--freze is not a setting; did you mean 'freeze'"),
        (GOOD, ["--unfreezing.phases", "2:100"], "begin with 0, only the head"),
        (
            GOOD,
            ["--unfreezing.phases", "0:50 9:50"],
            "9 blocks should train, but the encoder has only 3",
        ),
        (GOOD, ["--max_steps", "2"], "max_steps: 2 leaves no step for the phase"),
        (GOOD, ["--max_steps", "0"], "max_steps: 0 is not positive"),
        (GOOD, ["--evaluation.every_steps", "0"], "evaluation.every_steps: 0 is not positive"),
        (GOOD, ["--compile", "true"], "compile: this lab does not support torch.compile"),
        (GOOD, ["--batch.micro_batch_size", "3"], "batch.micro_batch_size: 3 does not divide"),
        (GOOD, ["--unfreezing.head_lr", "0"], "head_lr: 0.0 is not a positive number"),
        (GOOD, ["--data.text_column", "review"], "rows.jsonl:1: has no column 'review'"),
        (GOOD, ["--data.max_length", "2"], "data.max_length: 2 is not between 4 and 8192"),
        (GOOD, ["--data.class_names", "[a, b, c]"], "data.class_names: 3 names for 2 classes"),
        (GOOD[:1] * 3, [], "all rows are of one class, 'pos'"),
        (GOOD[:3], [], "class 'neg' has a single row"),
        ([*GOOD, '{"text": " ", "label": "pos"}'], [], "rows.jsonl:5: the text is empty"),
        ([*GOOD, '{"text": "fine", "label": null}'], [], "rows.jsonl:5: 'label' is missing"),
        ([*GOOD, '{"text": "fine"'], [], "rows.jsonl:5: is not JSON"),
        ([], [], "has no rows"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    lines: list[str], words: list[str], message: str, tmp_path: Path, environment: None
) -> None:
    data = rows_file(tmp_path, *lines)
    run_folder = tmp_path / "run"
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        settings = ["--dry_run", "--run_folder", str(run_folder), "--data.train", data]
        script.SCRIPT.main([*settings, "--data.test", data, *words])
    assert "\n" not in str(raised.value)
    assert not run_folder.exists()


def test_local_rows_need_both_parts_and_a_test_row_a_known_class(
    tmp_path: Path, environment: None
) -> None:
    train_rows = rows_file(tmp_path, *GOOD)
    with pytest.raises(UserError, match=r"data\.train: is given without data\.test"):
        config_of("--data.train", train_rows)
    with pytest.raises(UserError, match="does not exist"):
        config_of("--data.train", train_rows, "--data.test", str(tmp_path / "none.jsonl"))
    test_rows = tmp_path / "test.jsonl"
    test_rows.write_text('{"text": "hm", "label": "posi"}\n')
    with pytest.raises(UserError, match=r"test.jsonl:1: label 'posi' .* did you mean 'pos'"):
        config_of("--data.train", train_rows, "--data.test", str(test_rows))
    # Enough of both; the sample's rows are not asked for.
    rows = [json.dumps({"text": f"{text} {i}", "label": text}) for i in range(3) for text in "ab"]
    path = rows_file(tmp_path, *rows)
    assert script.phases_of(config_of("--data.train", path, "--data.test", path))[-1].end == 20
