"""arguments.py: the layers of the settings, and one line that says which of them is wrong."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from runfolder.errors import UserError
from train import tinyllama
from train.engine import arguments, training_arguments
from train.engine.config import StagedPaths, TextConfig
from train.engine.settings import OptimizerSettings
from train.labs.ag_news.settings import Config as NewsConfig
from train.labs.rag.settings import Config as RagConfig


@dataclass(kw_only=True)
class Inner:
    """What is inside."""

    lr: float = 0.5
    """The learning rate, 50% of
    what it was."""
    size: int | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"inner.lr: {self.lr} is not positive")


@dataclass(kw_only=True)
class Parent:
    steps: int = 1
    """Steps to take."""


@dataclass(kw_only=True)
class Config(Parent):
    """Train."""

    kind: Literal["a", "b"] = "a"
    maybe: Literal["a"] | None = None
    inner: Inner = field(default_factory=Inner)
    staged: StagedPaths | None = None
    dry_run: bool = False


def parse(words: str, dry_run: dict[str, Any] | None = None) -> Config:
    return arguments.parse(Config, words.split(), prog="prog", dry_run=dry_run or {})


def refusal(words: str) -> str:
    with pytest.raises(UserError) as raised:
        parse(words)
    return str(raised.value)


def file(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- layers ----


@given(
    in_file=st.none() | st.integers(), in_dry_run=st.integers(), on_line=st.none() | st.integers()
)
@settings(max_examples=40, deadline=None)
def test_the_command_line_wins_over_the_dry_run_over_the_file_over_the_default(
    tmp_path_factory: pytest.TempPathFactory,
    in_file: int | None,
    in_dry_run: int,
    on_line: int | None,
) -> None:
    layer = {} if in_file is None else {"inner": {"size": in_file}}
    path = file(tmp_path_factory.getbasetemp(), yaml.safe_dump(layer))
    line = "" if on_line is None else f" --inner.size={on_line}"
    dry_run = {"inner": {"size": in_dry_run}}
    assert parse(f"--config {path}{line}", dry_run).inner.size == (
        in_file if on_line is None else on_line
    )
    assert parse(f"--config {path} --dry_run{line}", dry_run).inner.size == (
        in_dry_run if on_line is None else on_line
    )


@pytest.mark.parametrize("switch", ["--dry_run", "--dry_run=true", "--dry_run true"])
def test_every_way_to_say_dry_run_brings_its_settings(switch: str) -> None:
    assert parse(f"{switch} --kind b", {"steps": 9}) == Config(steps=9, kind="b", dry_run=True)
    assert parse("--dry_run=false", {"steps": 9}).steps == 1


def test_a_resolved_dry_run_read_back_keeps_what_the_command_line_changed(tmp_path: Path) -> None:
    config = parse("--dry_run --steps 3", {"steps": 9})
    path = file(tmp_path, arguments.to_yaml(config))
    assert parse(f"--config {path}", {"steps": 9}) == config


def test_what_a_run_has_read_is_not_changed_when_it_goes_on(tmp_path: Path) -> None:
    def parse_again(words: str) -> TextConfig:
        path = file(tmp_path, arguments.to_yaml(began))
        words = f"--config {path} {words}"
        return arguments.parse(TextConfig, words.split(), prog="test", dry_run={})

    began = TextConfig(staged=StagedPaths(tokenizer="t", train="a", validation="b"))
    for words, before in (
        ("--data.train other.txt", "None"),
        ("--data.name=wikitext", "Salesforce/wikitext"),
        ("--model.name other --max_steps 9", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    ):
        option = words.partition("=")[0].partition(" ")[0]
        line = f"^{option}: cannot change during a run, which started with {before}; leave it out"
        with pytest.raises(UserError, match=line):
            parse_again(words)
    # The same is no change, and what counts anew is told apart by the checkpoint.
    again = parse_again("--data.text_column text --max_steps 9 --model.gradient_checkpointing")
    assert (again.max_steps, again.model.gradient_checkpointing) == (9, True)
    began = TextConfig()
    assert parse_again("--data.name other").data.name == "other"


def test_a_job_file_gives_its_arguments_and_a_settings_file_all(tmp_path: Path) -> None:
    job = file(tmp_path, "script: train/x.py\nresources: {nodes: 2}\narguments: {steps: 7}\n")
    assert parse(f"--config={job}").steps == 7
    assert parse(f"--config {file(tmp_path, 'steps: 8')}").steps == 8
    assert parse(f"--config {file(tmp_path, 'script: x.py')}") == Config()


def test_a_heading_whose_lines_are_comments_leaves_the_defaults(tmp_path: Path) -> None:
    assert parse(f"--config {file(tmp_path, 'inner:')}") == Config()


def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path: Path) -> None:
    # YAML 1.1 wants 1.0e-4; everybody writes 1e-4.
    assert parse(f"--config {file(tmp_path, 'inner: {lr: 1e-4}')}").inner.lr == 1e-4


lrs = st.floats(min_value=1e-300, max_value=1e300)
optimizers = st.builds(OptimizerSettings, lr=lrs, beta1=st.floats(0, 0.99), eps=lrs)


def means_something(text: str) -> bool:
    """Return whether YAML reads more than nothing; `null`, `~` and `#` are ways to say None."""
    try:
        return yaml.safe_load(text) is not None
    except yaml.YAMLError:
        return True


texts = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1)
names = st.none() | texts.filter(means_something)


@given(optimizer=optimizers, seed=st.integers(0, 2**32 - 1), config=names, staged=names)
@settings(max_examples=40, deadline=None)
def test_to_yaml_and_back_is_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    optimizer: OptimizerSettings,
    seed: int,
    config: str | None,
    staged: str | None,
) -> None:
    before = TextConfig(
        optimizer=optimizer, seed=seed, staged=StagedPaths(model=staged, train=staged or "")
    )
    before = dataclasses.replace(before, data=dataclasses.replace(before.data, config=config))
    path = file(tmp_path_factory.getbasetemp(), arguments.to_yaml(before))
    after = arguments.parse(TextConfig, ["--config", str(path)], prog="prog", dry_run={})
    assert after == before


# ---- mistakes ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--setps 3", "--setps is not a setting; did you mean 'steps'?"),
        ("--lr 3", "--lr is not a setting; did you mean 'inner.lr'?"),
        ("--inner.zise 3", "--inner.zise is not a setting; did you mean 'inner.size'?"),
        ("--steps x", "--steps: 'x' is not a whole number"),
        ("--steps 1.5", "--steps: '1.5' is not a whole number"),
        ("--steps=true", "--steps: 'True' is not a whole number"),
        ("--inner.lr x", "--inner.lr: 'x' is not a number"),
        ("--inner.lr nan", "--inner.lr: 'nan' is not a number"),
        ("--inner.size x", "--inner.size: 'x' is not a whole number or null"),
        ("--kind c", "--kind: 'c' is not one of a, b"),
        ("--dry_run 3", "--dry_run: '3' is not true or false"),
        ("--steps", "--steps: give a value, a whole number"),
        ("--steps --kind a", "--steps: give a value, a whole number"),
        ("steps 3", "'steps' is not a setting; settings begin with --, as in --max_steps 500"),
        ("--inner.lr 0", "--inner.lr: 0.0 is not positive"),
        ("--config", "--config: give a file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words: str, said: str) -> None:
    assert refusal(words) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("setps: 3", "'setps' is not a setting; did you mean 'steps'?"),
        ("inner: {lrr: 3}", "'inner.lrr' is not a setting; did you mean 'inner.lr'?"),
        ("lr: 3", "'lr' is not a setting; did you mean 'inner.lr'?"),
        ("3: 4", "'3' is not a setting; choose from"),
        ("inner: 3", "inner: is a group of settings, not '3'"),
        ("staged: {modle: x}", "'staged.modle' is not a setting; did you mean 'staged.model'?"),
        ("steps: x", "steps: 'x' is not a whole number"),
        ("steps:", "steps: is empty; give a whole number"),
        ("steps: [1]", "steps: '[1]' is not a whole number"),
        ("dry_run: 3", "dry_run: '3' is not true or false"),
        ("inner: {lr: 0}", "inner.lr: 0.0 is not positive"),
        ("- steps", "is not a mapping of settings"),
        ("", "is not a mapping of settings"),
        ("script: x.py\narguments: 3", "'arguments' is not a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_mistake_in_the_file_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    path = file(tmp_path, text)
    # A right setting on the command line does not take the blame from the file.
    assert refusal(f"--config {path} --kind b").startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("learning_rate", "optimizer.lr"),
        ("num_train_epochs", "max_steps"),
        ("per_device_train_batch_size", "batch.micro_batch_size"),
        ("output_dir", "run_folder"),
    ],
)
def test_a_name_of_training_arguments_is_answered_with_ours(theirs: str, ours: str) -> None:
    with pytest.raises(UserError) as raised:
        arguments.parse(tinyllama.Config, [f"--{theirs}=1"], prog="prog", dry_run={})
    assert str(raised.value) == f"--{theirs} is not a setting; here it is '{ours}'"


def test_every_name_of_training_arguments_means_a_setting_of_some_script() -> None:
    configs = (tinyllama.Config, NewsConfig, RagConfig)
    known = {name for config in configs for name in arguments._hints(config, "")}
    for theirs, ours in training_arguments.OURS.items():
        assert set(ours) <= known, theirs


def test_a_mistake_on_the_command_line_does_not_blame_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, "steps: 3\ninner: {lr: 1}")
    assert refusal(f"--config {path} --steps x") == "--steps: 'x' is not a whole number"
    assert refusal(f"--config {path} --inner.lr=0") == "--inner.lr: 0.0 is not positive"


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    assert (
        refusal(f"--config {tmp_path}/none.yaml") == f"{tmp_path}/none.yaml: there is no such file"
    )
    assert refusal(f"--config {tmp_path}") == f"{tmp_path}: cannot be read: Is a directory"
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert refusal(f"--config {binary}").startswith(f"{binary}: is not YAML")


words = st.one_of(
    st.sampled_from(
        [
            "--steps",
            "--inner.lr",
            "--inner",
            "--kind",
            "--dry_run",
            "--config",
            "3",
            "x",
            "--",
            "-x",
        ]
    ),
    st.text(max_size=6),
)


@given(st.lists(words, max_size=5))
@settings(max_examples=100, deadline=None)
def test_any_words_are_settings_or_one_mistake(found: list[str]) -> None:
    try:
        config = arguments.parse(Config, found, prog="prog", dry_run={"steps": 2})
    except UserError as error:
        assert str(error)
    else:
        assert isinstance(config.steps, int)
        assert isinstance(config.inner.lr, float)


def test_a_file_may_say_of_a_choice_that_there_is_none(tmp_path: Path) -> None:
    # As the resolved settings of a run do.
    path = tmp_path / "config.yaml"
    path.write_text(arguments.to_yaml(Config()))
    assert "maybe: null" in path.read_text()
    assert parse(f"--config {path}") == Config()


# ---- help ----


def test_help_shows_the_string_under_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Steps to take. (type: int, default: 1)" in shown
    assert "inner: What is inside." in shown
    assert "The learning rate, 50% of what it was. (type: float, default: 0.5)" in shown
    assert "staged" not in shown


def test_every_setting_of_the_script_has_a_place_in_its_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        arguments.parse(tinyllama.Config, ["-h"], prog="prog", dry_run={})
    shown = capsys.readouterr().out
    hidden = {"staged"}
    for name in arguments._hints(tinyllama.Config).keys() - hidden:
        assert f"--{name} " in shown
