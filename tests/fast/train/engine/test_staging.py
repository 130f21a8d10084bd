"""staging.py: what a run reads is found again while it is the same, refused when it is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runfolder.errors import UserError
from tests.models import write_tied_model
from tests.moments import Pause
from tests.shared import CHECKOUT
from tests.waiting import finish
from train.engine import rows, staging, tokenization
from train.engine.batches import Blocks
from train.engine.config import StagedPaths, TextConfig
from train.engine.data import SAMPLES, Piece
from train.engine.once import staged_path
from train.engine.settings import DataSettings, ModelSettings

TEXT = (SAMPLES / "validation.txt").read_text()
TINY = ModelSettings(preset="tiny")


@pytest.fixture(autouse=True)
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return this test's own datasets folder."""
    monkeypatch.setenv("SLUICE_DATASETS", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with train.txt and validation.txt."""
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A very small model folder, with a tokenizer as large as its vocabulary."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    return write_tied_model(tmp_path / "model", vocab_size=300, max_position_embeddings=64, **shape)


def configure(texts: Path, model: ModelSettings = TINY, **data: Any) -> TextConfig:
    local = {"train": str(texts / "train.txt"), "validation": str(texts / "validation.txt")}
    return TextConfig(model=model, data=DataSettings(**(local | data)))


def stage(config: TextConfig, *, online: bool = False) -> StagedPaths:
    return staging.stage(config, online=online)


def refusal(config: TextConfig, *, online: bool = False) -> str:
    with pytest.raises(UserError) as raised:
        stage(config, online=online)
    return str(raised.value)


def packed(datasets: Path) -> list[str]:
    """Return the packed texts, unfinished ones with their dot."""
    folder = datasets / "packed"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return [name for name in names if name != ".lock"]


# ---- found again ----


def test_the_second_time_the_same_is_said_of_the_data_and_nothing_is_touched(
    texts: Path, datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = stage(configure(texts))
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if line.startswith("staging ")]) == 4
    before = {path: path.stat().st_mtime_ns for path in datasets.rglob("*")}
    assert stage(configure(texts)) == first
    assert capsys.readouterr().out.splitlines() == [
        line for line in said if not line.startswith("staging ")
    ]
    assert {path: path.stat().st_mtime_ns for path in datasets.rglob("*")} == before
    assert Blocks(staged_path(first.train), 32).packed.num_bytes == len(TEXT)


def rewrite(texts: Path) -> dict[str, Any]:
    """Change the training text; return no settings."""
    # As long as it was: its time tells.
    file = texts / "train.txt"
    before = file.stat()
    file.write_text(TEXT.swapcase())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    return {}


CHANGES: list[Callable[[Path], dict[str, Any]]] = [
    lambda texts: {"train": str(texts / "validation.txt")},
    lambda texts: {"join_rows": True},
    lambda texts: {"text_column": "body"},
    rewrite,
]


@pytest.mark.parametrize("change", CHANGES, ids=["file", "join_rows", "column", "content"])
def test_another_text_is_packed_anew(
    texts: Path, model: Path, change: Callable[[Path], dict[str, Any]]
) -> None:
    settings = ModelSettings(name=str(model))
    before = stage(configure(texts, settings))
    after = stage(configure(texts, settings, **change(texts)))
    assert before.train != after.train
    assert before.tokenizer == after.tokenizer


def test_another_tokenizer_packs_the_text_anew(texts: Path, model: Path) -> None:
    settings = ModelSettings(name=str(model))
    before = stage(configure(texts, settings))
    tokenization.train([Piece(TEXT, starts=True, ends=True)], 290, model, "it")
    after = stage(configure(texts, settings))
    assert before.tokenizer != after.tokenizer
    assert before.train != after.train


def test_a_setting_that_changes_no_text_packs_nothing(texts: Path) -> None:
    before = stage(configure(texts))
    config = configure(texts, sequence_length=16)
    assert stage(replace(config, seed=1, max_steps=5)) == before


def test_a_folder_is_packed_anew_when_a_file_joins_it(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "many").mkdir()
    (tmp_path / "many/a.txt").write_text(TEXT)
    config = configure(texts, train=str(tmp_path / "many"))
    before = stage(config)
    (tmp_path / "many/b.txt").write_text(TEXT)
    assert stage(config).train != before.train


def read_by(staged: StagedPaths) -> tuple[int, int]:
    """Return the bytes of the training text and of the validation text."""
    folders = (staged_path(name) for name in (staged.train, staged.validation))
    train, validation = (Blocks(folder, 8).packed.num_bytes for folder in folders)
    return train, validation


def test_validation_text_within_the_training_folder_is_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "train.txt").write_text(TEXT)
    (folder / "val.txt").write_text(TEXT[:900].upper())
    # A copy by another name is the same text.
    (folder / "old-val.txt").write_text(TEXT[:900].upper())
    data = DataSettings(train=str(folder), validation=str(folder / "val.txt"))
    staged = stage(TextConfig(model=TINY, data=data))
    assert read_by(staged) == (len(TEXT), 900)
    said = capsys.readouterr().out
    assert "left out: old-val.txt (it is in data.validation)" in said
    assert "warning: " not in said


@pytest.mark.parametrize(("part", "share"), [(0, None), (1, "50.0%"), (2, "all")])
def test_the_share_of_validation_text_that_is_trained_on_is_said_on_each_run(
    tmp_path: Path, texts: Path, part: int, share: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"Line {n:03} of a text, as long as any other line.\n" for n in range(100)]
    (texts / "train.txt").write_text(TEXT + "".join(lines[: 50 * part]))
    (texts / "validation.txt").write_text("".join(lines))
    for _ in range(2):
        stage(configure(texts))
        warnings = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")
        ]
        assert [line.split()[2] for line in warnings] == ([share] if share else [])


def test_what_was_packed_before_files_were_read_otherwise_is_not_found_again(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stage(configure(texts))
    monkeypatch.setattr(rows, "READ_FORMAT", rows.READ_FORMAT + 1)
    assert stage(configure(texts)).train != before.train


def test_a_model_folder_is_read_where_it_lies(texts: Path, model: Path) -> None:
    found = stage(configure(texts, ModelSettings(name=str(model))))
    assert found.model == str(model)
    assert staged_path(found.model) == model
    assert staging.sequence_length(configure(texts, ModelSettings(name=str(model))), model) == 64


def test_a_dry_run_stages_the_embedded_sample_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = stage(TextConfig(model=TINY, dry_run=True))
    assert capsys.readouterr().out.splitlines() == [
        "staging a tokenizer trained on the embedded sample (train)",
        "staging the embedded sample (train)",
        "staging the embedded sample (validation)",
    ]
    size = (SAMPLES / "train.txt").stat().st_size
    assert Blocks(staged_path(found.train), 32).packed.num_bytes == size


# ---- what a run was staged with ----


def test_a_run_goes_on_with_the_text_that_it_began_with(texts: Path) -> None:
    config = configure(texts)
    staged = stage(config)
    rewrite(texts)
    assert stage(replace(config, staged=staged)) == staged
    # On a compute node the text itself is nowhere.
    (texts / "train.txt").unlink()
    assert stage(replace(config, staged=staged)) == staged


def test_what_was_staged_and_is_gone_is_made_again(texts: Path) -> None:
    config = configure(texts)
    staged = stage(config)
    for file in staged_path(staged.train).iterdir():
        file.unlink()
    staged_path(staged.train).rmdir()
    assert stage(replace(config, staged=staged)) == staged
    assert Blocks(staged_path(staged.train), 32).num_full > 0


# ---- refusals ----


def test_a_text_that_fits_no_block_or_no_target_is_refused(texts: Path, model: Path) -> None:
    settings = ModelSettings(name=str(model))
    (texts / "train.txt").write_text("short")
    said = refusal(configure(texts, settings))
    assert said.startswith(f"data.train: {texts}/train.txt has ")
    assert "but a block takes 65; give more text or a smaller --data.sequence_length" in said
    assert stage(configure(texts, settings, sequence_length=2)).train
    # Without frames a letter is a single token.
    (model / "tokenizer_config.json").write_text("{}")
    (model / "generation_config.json").unlink()
    shape = json.loads((model / "config.json").read_text())
    shape |= {"bos_token_id": None, "eos_token_id": None}
    (model / "config.json").write_text(json.dumps(shape))
    (texts / "validation.txt").write_text("T")
    said = refusal(configure(texts, settings, sequence_length=2))
    assert said.startswith(f"data.validation: {texts}/validation.txt has a single token")


def test_a_sequence_longer_than_the_models_context_is_refused_with_the_context(
    texts: Path, model: Path
) -> None:
    for settings, context in ((TINY, 128), (ModelSettings(name=str(model)), 64)):
        said = refusal(configure(texts, settings, sequence_length=context + 1))
        assert said.endswith(f"try --data.sequence_length {context}")
        assert stage(configure(texts, settings, sequence_length=context)).train


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused_before_and_after_packing(
    tmp_path: Path, texts: Path, model: Path, datasets: Path
) -> None:
    larger = tmp_path / "larger"
    larger.mkdir()
    tokenization.train([Piece(TEXT, starts=True, ends=True)], 310, larger, "it")
    settings = ModelSettings(name=str(model), tokenizer=str(larger))
    said = refusal(configure(texts, settings))
    assert said.startswith("model.tokenizer: has ids up to 309, but the model")
    assert "has only 300 tokens; leave it out" in said
    assert packed(datasets) == []
    # A preset grows with its tokenizer; what it packed is not for this model either.
    stage(configure(texts, ModelSettings(preset="tiny", tokenizer=str(larger))))
    assert refusal(configure(texts, settings)) == said


@pytest.mark.parametrize("content", ["", " \n\t\n "])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_text_without_text_is_refused_and_leaves_nothing(
    texts: Path, datasets: Path, split: str, content: str
) -> None:
    (texts / f"{split}.txt").write_text(content)
    said = refusal(configure(texts))
    assert said == f"data.{split}: {texts}/{split}.txt holds no text, or only white space"
    assert len(packed(datasets)) == (1 if split == "validation" else 0)
    assert not list(datasets.glob("*/.*.unfinished"))


def test_without_a_network_what_is_not_staged_is_refused_by_its_setting(
    texts: Path, datasets: Path
) -> None:
    assert refusal(configure(texts, ModelSettings())).startswith(
        "model.name: TinyLlama/TinyLlama-1.1B-Chat-v1.0 is not staged; run `make fetch`"
    )
    assert "data.name: Salesforce/wikitext (train) is not staged; run `make fetch`" in refusal(
        TextConfig(model=TINY)
    )
    assert not datasets.exists()


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "~/model", "gpt2", "a/b/c"])
def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_refused(texts: Path, name: str) -> None:
    said = refusal(configure(texts, ModelSettings(name=name)), online=True)
    assert said == f"model.name: {name} is neither a folder nor a hub id such as owner/name"


def test_a_text_that_this_user_may_not_see_is_one_line(texts: Path) -> None:
    (texts / "closed").mkdir()
    (texts / "closed/a.txt").write_text(TEXT)
    (texts / "closed").chmod(0)
    own = os.geteuid()
    if own == 0:
        # Nothing is closed to root. In this process: a child's interpreter may be out of sight.
        os.seteuid(65534)
    try:
        said = refusal(configure(texts, train=str(texts / "closed/a.txt")))
    finally:
        os.seteuid(own)
        (texts / "closed").chmod(0o700)
    assert "Permission denied" in said


# ---- processes ----


def command(texts: Path) -> list[str]:
    program = (
        "from train.engine import staging\n"
        "from train.engine.config import *\n"
        "from train.engine.settings import *\n"
        f"data = DataSettings(train='{texts}/train.txt', validation='{texts}/validation.txt')\n"
        "config = TextConfig(model=ModelSettings(preset='tiny'), data=data)\n"
        "print(staging.stage(config, online=False).train)\n"
    )
    return [sys.executable, "-c", program]


def test_processes_that_stage_the_same_at_once_make_it_once(texts: Path) -> None:
    (texts / "train.txt").write_text(TEXT * 20)
    processes = [
        subprocess.Popen(command(texts), cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    lines = [finish(process).stdout.splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({said[-1] for said in lines}) == 1
    staged = [line for said in lines for line in said if line.startswith("staging ")]
    assert len(staged) == len(set(staged)) == 4


def test_killed_while_it_packs_it_leaves_no_packed_text(
    texts: Path, datasets: Path, tmp_path: Path
) -> None:
    (texts / "train.txt").write_text(TEXT * 2)
    # After the tokenizer comes the text to train on.
    pause = Pause(tmp_path, "in-staging", time=2)
    with subprocess.Popen(
        command(texts),
        cwd=CHECKOUT,
        env=os.environ | pause.variable,
        stdout=subprocess.DEVNULL,
    ) as killed:
        pause.wait(lambda: killed.poll() is None)
        (unfinished,) = packed(datasets)
        assert (datasets / "packed" / unfinished / "tokens.bin").stat().st_size > len(TEXT) / 4
        killed.kill()
    assert [name for name in packed(datasets) if name[0] != "."] == []
    found = stage(configure(texts))
    assert Blocks(staged_path(found.train), 32).packed.num_bytes == 2 * len(TEXT)
    assert not list(datasets.glob("*/.*.unfinished"))
