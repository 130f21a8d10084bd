"""What users get wrong, said in one line: what, where and the next step, before torch is loaded.

Each case must exit 2, say one line, leave no run folder and nothing unfinished. A mistake is not
worth a minute of waiting, so that nothing on the way to it may import torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from cluster.commands import run
from tests import waiting
from tests.checkout import lay_out, rewrite
from tests.fast import command
from train.engine import tokenization
from train.engine.data import SAMPLES, Piece

TEXT = (SAMPLES / "validation.txt").read_text()


@dataclass
class Place:
    """Where a case happens: its own folder, with good texts, and a checkout that all share."""

    home: Path
    checkout: Path

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def job(self, content: str | bytes) -> None:
        """Make configs/jobs/wrong.yaml."""
        text = content if isinstance(content, bytes) else content.encode()
        (self.checkout / "configs/jobs/wrong.yaml").write_bytes(text)

    def model(self, *, vocab_size: int = 300) -> Path:
        """Make a model folder with all that one needs."""
        folder = self.home / "model"
        folder.mkdir()
        tokenization.train([Piece(TEXT, starts=True, ends=True)], vocab_size, folder, "it")
        shape = {"vocab_size": 300, "num_hidden_layers": 1, "max_position_embeddings": 64}
        (folder / "config.json").write_text(json.dumps(shape))
        save_file({"a": np.ones(3, np.float32)}, folder / "model.safetensors")
        return folder

    def run_folder(self, record: str = "") -> Path:
        """Make a run folder that could be continued."""
        folder = self.home / "runs/tinyllama/20260101-000000-abcdef"
        folder.mkdir(parents=True)
        good = {"job": "tinyllama", "module": "train.tinyllama", "accel": "ddp"}
        (folder / "run.json").write_text(record or json.dumps(good | {"num_processes": 1}))
        (folder / "config.yaml").write_text("max_steps: 3\n")
        (folder / "code").symlink_to(self.checkout)
        return folder


Prepare = Callable[[Place], object]


def nothing(place: Place) -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Case:
    """A mistake: the words of the command, what is said of it, and what must be there before."""

    words: str
    said: str
    prepare: Prepare = nothing
    environment: str = ""


# Good settings, to which a case adds a wrong one; {home} is the case's own folder.
TINY = "--model.preset tiny --data.sequence_length 32"
LOCAL = "--data.train {home}/train.txt --data.validation {home}/validation.txt"
GOOD = f"{TINY} {LOCAL}"


def text(name: str, content: str | bytes, said: str) -> Case:
    """Return the case of a training text that is wrong; `said` is what follows its path."""
    words = f"-- {TINY} --data.train {{home}}/{name} --data.validation {{home}}/validation.txt"
    return Case(words, said, lambda place: place.write(name, content))


def job(content: str | bytes, said: str) -> Case:
    """Return the case of a job file that is wrong."""
    path = r"configs/jobs/wrong\.yaml"
    return Case("--job wrong", f"{path}: {said}", lambda place: place.job(content))


def model(said: str, spoil: Prepare, *, words: str = "") -> Case:
    """Return the case of a model folder that `spoil` damages."""

    def prepare(place: Place) -> None:
        place.model()
        spoil(place)

    words = f"-- --model.name {{home}}/model {LOCAL} {words}"
    return Case(words, said, prepare)


def parquet(place: Place) -> bytes:
    pq.write_table(pa.table({"body": [TEXT]}), place.home / "whole.parquet")
    return (place.home / "whole.parquet").read_bytes()


def larger_tokenizer(place: Place) -> None:
    folder = place.home / "larger"
    folder.mkdir()
    tokenization.train([Piece(TEXT, starts=True, ends=True)], 310, folder, "it")


def sentencepiece(place: Place) -> None:
    (place.home / "model/tokenizer.json").unlink()
    place.write("model/tokenizer.model", b"\x0anot a model")


CASES = {
    # ---- the variables of make ----
    "unknown option": Case("--jbo x", "unrecognized arguments: --jbo x; .*--help` lists"),
    "option of a cluster": Case("--nodes 2", "NODES=2: is for a cluster; .* NPROC= processes"),
    "unknown JOB": Case("--job tinylama", "JOB=tinylama: .*did you mean 'tinyllama'"),
    "JOB that is a path": Case("--job ../tinyllama", r"JOB=\.\./tinyllama: .*'tinyllama'"),
    "unknown ACCEL": Case(f"--accel zero22 -- {GOOD}", "ACCEL=zero22: .*did you mean 'zero2'"),
    "unknown RUN": Case("--run nothing", "RUN=nothing: .*holds no runs yet"),
    "RUN of a damaged record": Case(
        "--run tinyllama", r"\S+/run\.json: is not the record", lambda place: place.run_folder("{")
    ),
    "NPROC that is no number": Case(f"--nproc two -- {GOOD}", "NPROC=two: must be a whole number"),
    "NPROC of 0": Case(f"--nproc 0 -- {GOOD}", "NPROC=0: .*, at least 1"),
    "NPROC over the GPUs": Case(
        f"--nproc 3 -- {GOOD}",
        "NPROC=3: this machine has 2 GPUs",
        environment="CUDA_VISIBLE_DEVICES=0,1",
    ),
    "NAME with a slash": Case(f"--name a/b -- {GOOD}", "NAME=a/b: use letters, digits"),
    # ---- job files ----
    "job that is not YAML": job("a: [", "is not valid YAML: .*line 1"),
    "job in another encoding": job("script: ü".encode("utf-16"), "is not valid YAML"),
    "empty job": job("", "is not a mapping with script, resources and arguments"),
    "job that is a list": job("- script", "is not a mapping with"),
    "unknown key of a job": job("scirpt: x", "'scirpt' is not a setting; did you mean 'script'"),
    "script that does not exist": job("script: train/x.py", "script: train/x.py does not exist"),
    "wrong resources": job(
        "script: train/tinyllama.py\nresources: {nodes: many}",
        "resources.nodes: 'many' must be a whole number",
    ),
    "unknown setting in a file": job(
        "script: train/tinyllama.py\narguments: {optimizer: {learning_rate: 1}}",
        r"'optimizer\.learning_rate' is not a setting; did you mean 'optimizer\.lr'",
    ),
    "misspelt setting in a file": job(
        "script: train/tinyllama.py\narguments: {optimizer: {weigth_decay: 1}}",
        r"'optimizer\.weigth_decay' is not a setting; did you mean 'optimizer\.weight_decay'",
    ),
    "wrong type in a file": job(
        "script: train/tinyllama.py\narguments: {max_steps: many}",
        "max_steps: 'many' is not a whole number",
    ),
    # ---- settings ----
    "unknown setting": Case("-- --maxsteps 5", "--maxsteps is not .*did you mean 'max_steps'"),
    "last word of a setting": Case("-- --lr 1", r"--lr is not .*did you mean 'optimizer\.lr'"),
    "wrong type": Case("-- --max_steps many", "--max_steps: 'many' is not a whole number"),
    "not a choice": Case("-- --schedule.kind x", r"--schedule\.kind: 'x' is not one of cosine"),
    "no value": Case("-- --max_steps", "--max_steps: give a value, a whole number"),
    "word without dashes": Case("-- max_steps 5", "'max_steps' is not a setting; settings begin"),
    "negative steps": Case("-- --max_steps -1", "--max_steps: -1 is not positive"),
    "learning rate of 0": Case("-- --optimizer.lr 0", r"--optimizer\.lr: 0\.0 is not positive"),
    "unknown preset": Case("-- --model.preset tinny", r"--model\.preset: .*did you mean 'tiny'"),
    "batch that does not divide": Case(
        f"--nproc 3 -- {GOOD}", r"batch\.global_batch_size: 16 .* try --batch\.global_batch_size 15"
    ),
    "micro batch that does not divide": Case(
        f"-- {GOOD} --batch.micro_batch_size 5",
        r"batch\.micro_batch_size: 5 does not divide the 16",
    ),
    "wrong setting of a fetch": Case("--fetch -- --maxsteps 5", "--maxsteps is not a setting"),
    # ---- texts ----
    "text without validation": Case(
        f"-- {TINY} --data.train {{home}}/train.txt",
        r"--data\.train: is given without data\.validation; give both",
    ),
    "text that is not there": Case(
        f"-- {TINY} --data.train none.txt --data.validation {{home}}/validation.txt",
        r"data\.train: none\.txt does not exist",
    ),
    "folder without text": text(
        "folder/a.md", TEXT, r"data\.train: \S+/folder/a\.md has an unsupported suffix"
    ),
    "unknown suffix": text("a.docx", TEXT, r"data\.train: \S+/a\.docx .* use \.txt, "),
    "empty text": text("a.txt", "", r"data\.train: \S+/a\.txt holds no text"),
    "white space": text(
        "a.txt", " \n\t\n", r"data\.train: \S+/a\.txt holds no text, or only white"
    ),
    "binary as text": text(
        "a.txt", b"\x7fELF\x02\x01\x00", r"\S+/a\.txt:1: is not text: it contains a"
    ),
    "invalid UTF-8": text("a.txt", b"one\ntwo \xe4\n", r"\S+/a\.txt:2: is not UTF-8 text .*iconv"),
    "csv without the column": text(
        "a.csv",
        "id,body\n1,x\n",
        r"\S+/a\.csv: has no column 'text'; choose from id, body with --data\.t",
    ),
    "jsonl without the column": text(
        "a.jsonl", '{"body": "x"}\n', r"\S+/a\.jsonl:1: has no column 'text'; choose from body with"
    ),
    "malformed jsonl": text(
        "a.jsonl", '{"text": "x"}\n{"text": \n', r"\S+/a\.jsonl:2: is not JSON: Expecting value"
    ),
    "parquet without the column": Case(
        f"-- {TINY} --data.train {{home}}/whole.parquet --data.validation {{home}}/validation.txt",
        r"\S+/whole\.parquet: has no column 'text'; choose from body with --data\.text_column",
        parquet,
    ),
    "truncated parquet": Case(
        f"-- {TINY} --data.train {{home}}/a.parquet --data.validation {{home}}/validation.txt",
        r"\S+/a\.parquet: is damaged, or not a parquet file: ",
        lambda place: place.write("a.parquet", parquet(place)[:-9]),
    ),
    "text shorter than a block": text(
        "a.txt",
        "Too short.",
        r"data\.train: \S+/a\.txt has \d+ tokens, but a block takes 33; give more",
    ),
    "sequence over the context": Case(
        f"-- {GOOD} --data.sequence_length 129", r"data\.sequence_length: 129 .* try --data\S+ 128"
    ),
    "data that is not staged": Case(
        f"-- {TINY}", r"a tokenizer trained on data\.name: Salesforce/wikitext .* run `make fetch`"
    ),
    # ---- models and tokenizers ----
    "model that is not staged": Case(
        f"-- {LOCAL}", r"model\.name: TinyLlama/\S+ .* run `make fetch`"
    ),
    "model that is nothing": Case(
        f"-- --model.name ./nothing {LOCAL}",
        r"model\.name: \./nothing is neither a folder nor a hub",
    ),
    "model without config.json": model(
        r"model\.name: \S+/model holds no config\.json",
        lambda place: (place.home / "model/config.json").unlink(),
    ),
    "model without weights": model(
        r"model\.name: \S+/model holds neither model\.safetensors nor .*; convert its weights",
        lambda place: (place.home / "model/model.safetensors").unlink(),
    ),
    "weights that are cut short": model(
        r"model\.name: \S+/model\.safetensors is cut short: .* download the model again",
        lambda place: os.truncate(place.home / "model/model.safetensors", 70),
    ),
    "model without tokenizer": model(
        r"model\.tokenizer: \S+/model holds neither .* with --model\.tokenizer",
        lambda place: (place.home / "model/tokenizer.json").unlink(),
    ),
    "tokenizer that is not there": model(
        r"model\.tokenizer: none does not exist", nothing, words="--model.tokenizer none"
    ),
    "corrupt tokenizer.json": model(
        r"model\.tokenizer: \S+/tokenizer\.json cannot be read",
        lambda place: place.write("model/tokenizer.json", "{}"),
    ),
    "corrupt tokenizer.model": model(
        r"model\.tokenizer: \S+/tokenizer\.model is not a sentencepiece model; give its",
        sentencepiece,
    ),
    # ---- places ----
    "runs below a file": Case(
        f"-- {GOOD}",
        r"SLUICE_RUNS: \S+/train\.txt is not a folder that you can write to; choose another",
        environment="SLUICE_RUNS={home}/train.txt/runs",
    ),
    "datasets below a file": Case(
        f"-- {GOOD}",
        r"SLUICE_DATASETS: \S+/train\.txt is not a folder",
        environment="SLUICE_DATASETS={home}/train.txt/datasets",
    ),
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout for wrong job files, and a torch that leaves a trace when it is imported."""
    root = tmp_path_factory.mktemp("checkout")
    lay_out(root, "cluster/", "runfolder/", "configs/", "containers/", "slurm/", "train/")
    # The environment of the tests has all.
    rewrite(root / "containers/venv.sh", "#!/bin/sh\n")
    rewrite(
        root / "torch/__init__.py",
        "import os\nopen(os.environ['TORCH_TRACE'], 'w').close()\nraise ImportError('fake')\n",
    )
    return root


@pytest.fixture
def place(tmp_path: Path, checkout: Path) -> Place:
    found = Place(tmp_path, checkout)
    for split in ("train", "validation"):
        found.write(f"{split}.txt", TEXT)
    return found


def environment_of(place: Place, case: Case, environment: dict[str, str]) -> dict[str, str]:
    """Return the environment of a case: the places are below its home."""
    home = str(place.home)
    settings = {
        f"SLUICE_{name.upper()}": f"{home}/{name}" for name in ("runs", "datasets", "cache")
    }
    settings |= {"HOME": home, "TORCH_TRACE": f"{home}/torch-was-imported"}
    if case.environment:
        name, _, value = case.environment.replace("{home}", home).partition("=")
        settings[name] = value
    return environment | settings


def words_of(place: Place, case: Case) -> list[str]:
    return [word.replace("{home}", str(place.home)) for word in case.words.split()]


def assert_refused(place: Place, case: Case, done: subprocess.CompletedProcess[str]) -> None:
    """Check all that holds for every refusal."""
    assert done.returncode == 2, done.stderr
    # Only what was put in place on the way to the mistake.
    assert all(re.match("(staging|fetching) ", line) for line in done.stdout.splitlines())
    assert done.stderr.endswith("\n")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.match(f"error: {case.said}", done.stderr), done.stderr
    assert not list(place.home.glob("runs/*/.*"))
    assert not list(place.home.glob("datasets/*/.*.unfinished"))


def refusal(
    place: Place, case: Case, environment: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    folders = set(place.home.glob("runs/*/*"))
    # An import of it, in whatever function, is an error from here on.
    with mock.patch.dict(sys.modules, {"torch": None}):
        done = command.call(
            run.main,
            *words_of(place, case),
            folder=place.checkout,
            environment=environment_of(place, case, environment),
            capfd=capfd,
        )
    assert_refused(place, case, done)
    assert set(place.home.glob("runs/*/*")) == folders


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line(
    place: Place, clean_environment: dict[str, str], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    CASES[name].prepare(place)
    refusal(place, CASES[name], clean_environment, capfd)


def test_a_run_that_is_in_use_is_refused_with_its_holder(
    place: Place, clean_environment: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = place.run_folder()
    with (folder / "run.lock").open("w") as lock:
        lock.write("process 7 on node1 since noon")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = rf"{folder}: in use by another run \(process 7 on node1 since noon\); wait or stop"
        refusal(place, Case("--run tinyllama", said), clean_environment, capfd)


# ---- the processes themselves ----


def run_process(
    place: Place, case: Case, environment: dict[str, str], *before: str
) -> subprocess.CompletedProcess[str]:
    return waiting.run(
        [*before, sys.executable, "-m", "cluster", "run", *words_of(place, case)],
        cwd=place.checkout,
        env=environment_of(place, case, environment),
    )


def test_a_mistake_that_is_found_last_ends_the_process_before_torch_is_imported(
    place: Place, clean_environment: dict[str, str]
) -> None:
    case = CASES["text shorter than a block"]
    case.prepare(place)
    assert_refused(place, case, run_process(place, case, clean_environment))
    assert list(place.home.glob("datasets/packed/*")), "it was packed on the way"
    assert not (place.home / "runs").exists()
    assert not (place.home / "torch-was-imported").exists()


@pytest.mark.needs("unshare")
@pytest.mark.parametrize("name", ["runs", "datasets"])
def test_a_file_system_that_is_read_only_is_refused_by_the_variable_that_moves_it(
    place: Place, clean_environment: dict[str, str], name: str
) -> None:
    # Root writes past permissions, but not to this.
    target = place.home / name
    target.mkdir()
    mount = 'mount -t tmpfs -o ro none "$0" && exec "$@"'
    before = ("unshare", "--map-root-user", "--mount", "bash", "-c", mount, str(target))
    case = Case(f"-- {GOOD}", f"SLUICE_{name.upper()}: {target}.* writ.*choose another place")
    assert_refused(place, case, run_process(place, case, clean_environment, *before))
    assert not list(place.home.glob("runs/*/*"))
