from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runfolder.checkpoints import published
from runfolder.errors import UserError
from tests import ranks
from tests.conftest import losses, read_metrics
from tests.shared import CHECKOUT
from train.engine import arguments, metrics, signals
from train.engine.errors import RunFailed
from train.labs.ag_news import script
from train.labs.ag_news.settings import Config

JOB = "configs/jobs/ag_news.yaml"
Train = Callable[..., str]


def make_config(*words: str) -> Config:
    """Return the job's settings in a short dry run, staged."""
    config = arguments.parse(
        Config,
        ["--config", str(CHECKOUT / JOB), "--dry_run", "--log_every_steps", "1", *words],
        prog="test",
        dry_run=script.DRY_RUN,
    )
    return script.stage(config, online=False)


@pytest.fixture(autouse=True)
def signals_set_a_flag() -> None:
    signals.forget_rehearsal()
    signals.install_first()


def predictions(run_folder: Path, seed: int = 42) -> list[dict[str, object]]:
    lines = (run_folder / f"seed-{seed}" / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# ---- the run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a dry run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    assert script.train(make_config(), folder, device, rehearse_stop=False) == "finished"
    return folder


def test_stopped_and_resumed_ends_bit_for_bit_as_uninterrupted(
    straight: Path, device: torch.device, tmp_path: Path
) -> None:
    config = make_config()
    assert script.train(config, tmp_path, device, rehearse_stop=True) == "rehearsed"
    # The signal comes before the validation rows of this step are scored, and stops that.
    half = published(tmp_path / "checkpoints")[0]
    assert half.name == "step-00000030"
    assert max(line["step"] for line in read_metrics(tmp_path)) == 29
    assert not (tmp_path / "attempts").exists()
    assert not (tmp_path / "seed-42").exists()
    # Asked again while it makes up for those: they are scored to the end, and it stops then.
    assert script.train(config, tmp_path, device, rehearse_stop=False) == "stopped"
    assert published(tmp_path / "checkpoints")[0].name == "step-00000031"
    signals.forget_rehearsal()
    assert script.train(config, tmp_path, device, rehearse_stop=False) == "finished"

    assert losses(tmp_path) == losses(straight)
    assert list(losses(tmp_path)) == list(range(1, config.max_steps + 1))
    for line, expected in zip(read_metrics(tmp_path), read_metrics(straight), strict=True):
        for key in ("step", "lr", "grad_norm", "tokens", "padding", "validation_loss"):
            assert line.get(key) == expected.get(key), (line["step"], key)
    weights, expected_weights = (
        load_file(published(folder / "checkpoints")[0] / "model.safetensors")
        for folder in (tmp_path, straight)
    )
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    assert predictions(tmp_path) == predictions(straight)


def test_it_learns_and_the_scores_are_those_of_the_predictions(straight: Path) -> None:
    rows = predictions(straight)
    correct = [row["label"] == row["predicted"] for row in rows]
    scores = json.loads((straight / "seed-42" / "scores.json").read_text())
    assert len(rows) == scores["rows"] == 41
    assert scores["accuracy"] == pytest.approx(sum(correct) / 41)
    assert sum(entry["support"] for entry in scores["per_class"]) == 41
    assert scores["accuracy"] > 0.5  # Chance is 0.25.
    assert (straight / "seed-42" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    outcome = json.loads((straight / "attempts" / "1" / "outcome.json").read_text())
    assert outcome["outcome"] == "finished"
    assert outcome["step"] == 60
    assert outcome["metrics"]["test_accuracy"] == scores["accuracy"]
    assert read_metrics(straight)[0]["validation_accuracy"] < 0.5


def test_retention_keeps_the_newest_and_nothing_hidden(straight: Path) -> None:
    kept = [folder.name for folder in published(straight / "checkpoints")]
    assert kept == ["step-00000060", "step-00000050", "step-00000040"]
    assert not list((straight / "checkpoints" / ".trainer").glob("*"))


def test_the_export_is_for_the_pipeline_of_transformers(straight: Path) -> None:
    from transformers import pipeline

    classify = pipeline("text-classification", str(straight / "export"), device="cpu")
    assert classify.tokenizer.model_max_length == 64
    for row in predictions(straight)[:5]:
        (answer,) = classify(row["text"], truncation=True)
        assert answer["label"] == row["predicted"]
        assert answer["score"] == pytest.approx(max(row["probabilities"]), abs=1e-4)  # type: ignore[call-overload]


def test_several_seeds_resume_amid_the_second_past_a_damaged_checkpoint(
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--num_seeds", "2", "--max_steps", "16", "--checkpoint.every_steps", "2")
    config = make_config(*words, "--evaluation.every_steps", "4")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    assert script.train(config, straight, device, rehearse_stop=False) == "finished"

    write = metrics.Metrics.write

    def write_and_signal(self: metrics.Metrics, line: dict[str, object]) -> None:
        write(self, line)
        if line["step"] == 12:
            signals.rehearse()

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "write", write_and_signal)
        assert script.train(config, stopped, device, rehearse_stop=False) == "stopped"
    outcome = json.loads((stopped / "attempts" / "1" / "outcome.json").read_text())
    assert outcome["reason"] == "SIGUSR1"
    assert outcome["step"] == 13
    newest = stopped / "checkpoints" / outcome["checkpoint"]
    damaged = bytearray((newest / "optimizer.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(bytes(damaged))
    signals.forget_rehearsal()
    capsys.readouterr()
    assert script.train(config, stopped, device, rehearse_stop=False) == "finished"
    told = capsys.readouterr().out
    assert "step-00000013 is damaged (optimizer.pt does not match its sha256" in told
    assert "resuming from step-00000012" in told

    assert losses(stopped) == losses(straight)
    assert list(losses(stopped)) == list(range(1, 17))
    for seed in (42, 43):
        assert predictions(stopped, seed) == predictions(straight, seed)
    assert predictions(stopped, 42) != predictions(stopped, 43)
    found = json.loads((stopped / "attempts" / "1" / "outcome.json").read_text())["metrics"]
    accuracies = [
        json.loads((stopped / f"seed-{seed}" / "scores.json").read_text())["accuracy"]
        for seed in (42, 43)
    ]
    assert found["test_accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert found["test_accuracy_sd"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)

    # A seed that was tested is not tested again, and nothing of the record is lost.
    before = (stopped / "metrics.jsonl").read_bytes()
    assert script.train(config, stopped, device, rehearse_stop=False) == "finished"
    assert "test, 2 seeds: accuracy" in capsys.readouterr().out
    assert (stopped / "metrics.jsonl").read_bytes() == before
    # What the place in the data would mean nothing without.
    other = make_config(*words, "--batch.global_batch_size", "8")
    with pytest.raises(UserError, match="was made with global_batch_size 16, not 8"):
        script.train(other, stopped, device, rehearse_stop=False)
    other = make_config(*words, "--data.validation_fraction", "0.3")
    with pytest.raises(UserError, match=r"was made with data\.validation_fraction 0\.2, not"):
        script.train(other, stopped, device, rehearse_stop=False)


def test_settings_given_on_continuing_are_taken(device: torch.device, tmp_path: Path) -> None:
    words = ("--schedule.kind", "constant", "--schedule.warmup_steps", "0")
    first = make_config("--max_steps", "3", *words)
    assert script.train(first, tmp_path, device, rehearse_stop=False) == "finished"
    more = make_config("--max_steps", "5", *words, "--optimizer.lr", "7e-4")
    assert script.train(more, tmp_path, device, rehearse_stop=False) == "finished"
    lr = {line["step"]: line["lr"] for line in read_metrics(tmp_path) if "lr" in line}
    assert lr == {1: 3e-3, 2: 3e-3, 3: 3e-3, 4: 7e-4, 5: 7e-4}
    assert json.loads((tmp_path / "seed-42" / "scores.json").read_text())["step"] == 5


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(
    device: torch.device, tmp_path: Path
) -> None:
    config = make_config("--optimizer.lr", "1e38", "--checkpoint.every_steps", "1")
    with pytest.raises(RunFailed, match=r"the (loss|gradient) of step \d+ is not finite"):
        script.train(config, tmp_path, device, rehearse_stop=False)


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, []

    def full(*arguments: object, **more: object) -> None:
        calls.append(arguments)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        save(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunFailed, match=r"could not be written \(rank 0: .*No space left"):
        script.train(make_config(), tmp_path, device, rehearse_stop=False)
    assert [folder.name for folder in published(tmp_path / "checkpoints")] == ["step-00000010"]


# ---- what is wrong is said at once ------------------------------------------------------------

GOOD = '{"text": "rain again", "label": "a"}\n{"text": "sun", "label": "b"}\n' * 4


@pytest.mark.parametrize(
    ("train_rows", "test_rows", "words", "message"),
    [
        (GOOD, GOOD + '{"text": "x", "label": "c"}\n', [], r"test.jsonl:9: label 'c' is not in"),
        (GOOD + '{"text": "x"}\n', GOOD, [], r"train.jsonl:9: has no column 'label'"),
        (GOOD + "{oops}\n", GOOD, [], r"train.jsonl:9: is not JSON"),
        (GOOD + '{"text": " ", "label": "a"}\n', GOOD, [], r":9: the text is empty; leave"),
        (GOOD + '{"text": 7, "label": "a"}\n', GOOD, [], r":9: 'text' is not text but int"),
        (GOOD + '{"text": "x", "label": null}\n', GOOD, [], r":9: 'label' is missing"),
        (GOOD + '{"text": "x", "label": -1}\n', GOOD, [], r":9: 'label' is -1, which means"),
        (GOOD + '{"text": "x", "label": "c"}\n', GOOD, [], r"class 'c' has a single row"),
        ('{"text": "x", "label": "a"}\n' * 3, GOOD, [], r"all rows are of one class, 'a'"),
        ("", GOOD, [], r"data.train: .*train.jsonl: has no rows"),
        (GOOD, "", [], r"data.test: .*test.jsonl: has no rows"),
        (GOOD, GOOD, ["--data.text_column", "body"], r"no column 'body'; choose from text, label"),
        (GOOD, GOOD, ["--data.title_column", "text"], r"title_column: 'text' is data.text_column"),
        (GOOD, GOOD, ["--data.class_names", "[x, y, z]"], r"class_names: 3 names for 2 classes"),
        (GOOD, GOOD, ["--data.class_names", "[x, y]"], r"is for classes that are whole numbers"),
        (GOOD, GOOD, ["--data.class_names", "[x, x]"], r"class_names: 'x' is empty or appears"),
        (GOOD, GOOD, ["--data.test", "null"], r"data.train: is given without data.test"),
        (GOOD, GOOD, ["--data.test", "nowhere.csv"], r"data.test: nowhere.csv does not exist"),
        (GOOD, GOOD, ["--data.validation_fraction", "0.9"], r"0.9 is not between 0.01 and 0.5"),
        (GOOD, GOOD, ["--data.max_length", "2"], r"max_length: 2 is not between"),
        (GOOD, GOOD, ["--num_seeds", "0"], r"num_seeds: 0 is not positive"),
        (GOOD, GOOD, ["--num_seeds", "3", "--max_steps", "10"], r"try --max_steps 12"),
        (GOOD, GOOD, ["--num_epochs", "-1"], r"num_epochs: -1.0 is not a positive number"),
        (GOOD, GOOD, ["--num_epochs", "2", "--max_steps", "9"], r"leave one of them out"),
        (GOOD, GOOD, ["--evaluation.every_steps", "0"], r"evaluation.every_steps: 0 is not"),
        (GOOD, GOOD, ["--batch.micro_batch_size", "5"], r"5 does not divide the 64 sequences"),
        (GOOD, GOOD, ["--learning_rate", "1"], r"--learning_rate is not a setting"),
        (GOOD, GOOD, ["--model.preset", "null", "--model.name", "nowhere/at/all"], r"model.name"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    environment: None,
    tmp_path: Path,
    train_rows: str,
    test_rows: str,
    words: list[str],
    message: str,
) -> None:
    files = {"train": train_rows, "test": test_rows}
    given = []
    for split, rows in files.items():
        (tmp_path / f"{split}.jsonl").write_text(rows)
        given += [f"--data.{split}", str(tmp_path / f"{split}.jsonl")]
    run_folder = tmp_path / "run"
    settings = [f"--run_folder={run_folder}", "--batch.global_batch_size", "64"]
    settings += ["--model.preset", "tiny", *given, *words]
    with pytest.raises(UserError, match=message) as raised:
        script.SCRIPT.main(settings)
    assert "\n" not in str(raised.value)
    assert not run_folder.exists()


def test_a_batch_that_does_not_divide_is_refused_before_the_queue(
    environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="16 sequences do not divide among 3 processes"):
        make_config()


def test_another_strategy_is_refused(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(UserError, match="ACCEL=zero2: this lab teaches ddp; leave ACCEL out"):
        script.train(config, tmp_path, device, rehearse_stop=False)
    assert not list(tmp_path.iterdir())


def test_steps_follow_from_epochs_and_seeds(environment: None) -> None:
    # 80 rows in batches of 16.
    assert make_config("--num_epochs", "2").max_steps == 10
    assert make_config("--num_epochs", "2.1", "--num_seeds", "3").max_steps == 33
    assert make_config("--max_steps", "0").max_steps == 15  # three epochs
    # What a run's config.yaml says is taken as it is.
    again = script.stage(make_config("--num_epochs", "2"), online=False)
    assert (again.max_steps, again.num_epochs) == (10, None)


def test_torch_is_not_loaded_for_a_wrong_setting() -> None:
    check = "import sys, train.labs.ag_news.script; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=CHECKOUT, check=False).returncode == 0


def test_it_computes_in_fp32_although_the_launchers_file_says_bf16(
    straight: Path, clean_environment: dict[str, str], tmp_path: Path
) -> None:
    words = ["--config", JOB, "--dry_run", "--log_every_steps", "1", "--run_folder", str(tmp_path)]
    # As `accelerate launch` sets it from every file of configs/accelerate.
    environment = clean_environment | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    done = ranks.run("ddp", 1, "train.labs.ag_news.script", *words, environment=environment)
    assert done.returncode == 0, done.stderr
    assert predictions(tmp_path) == predictions(straight)
    done = ranks.run(
        "ddp",
        1,
        "train.labs.ag_news.script",
        *words[:-1],
        str(tmp_path / "bf16"),
        *("--precision", "bf16"),
        environment=environment,
    )
    assert done.returncode == 0, done.stderr
    assert predictions(tmp_path / "bf16") != predictions(straight)
