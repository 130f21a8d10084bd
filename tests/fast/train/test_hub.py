"""The hub, for real but for the server: fetched once with a network, then trained without one."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from runfolder.errors import UserError
from tests import waiting
from tests.conftest import read_metrics
from tests.hub import Hub
from tests.shared import CHECKOUT
from train import resolve
from train.engine import tokenization
from train.engine.data import SAMPLES, pieces
from train.engine.presets import PRESETS

JOB = yaml.safe_load((CHECKOUT / "configs/jobs/tinyllama.yaml").read_text())["arguments"]
MODEL, MODEL_REVISION = JOB["model"]["name"], JOB["model"]["revision"]
DATASET, DATASET_REVISION = JOB["data"]["name"], JOB["data"]["revision"]
CONFIG = JOB["data"]["config"]

# As the dataset's own README begins.
README = f"""---
language:
- en
configs:
- config_name: {CONFIG}
  data_files:
  - split: test
    path: {CONFIG}/test-*
  - split: train
    path: {CONFIG}/train-*
  - split: validation
    path: {CONFIG}/validation-*
---
# Dataset Card
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of a model as small as a dry run's, and of a dataset with rows as WikiText's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    shape = LlamaConfig(**vars(PRESETS["tiny"]))
    LlamaForCausalLM(shape).save_pretrained(folder)
    text = pieces([SAMPLES / "train.txt"], text_column="text", join_rows=False)
    tokenization.train(text, 512, folder, "the sample")
    (folder / tokenization.FRAME).unlink()
    model = {path.name: path.read_bytes() for path in folder.iterdir()}
    # What is not asked for: these weights are for another library.
    model["pytorch_model.bin"] = b"x" * 1000
    dataset = {"README.md": README.encode()}
    for split in ("train", "validation", "test"):
        stream = io.BytesIO()
        pq.write_table(pa.table({"text": rows(split)}), stream)
        dataset[f"{CONFIG}/{split}-00000-of-00001.parquet"] = stream.getvalue()
    return {"models": model, "datasets": dataset}


def rows(split: str) -> list[str]:
    """Return a row for each line: its text with the line's end, nothing for an empty line."""
    lines = (SAMPLES / f"{'train' if split == 'train' else 'validation'}.txt").read_text()
    return [f" {line} \n" if line else "" for line in lines.splitlines()]


@pytest.fixture
def hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    with Hub() as server:
        server.add("models", MODEL, MODEL_REVISION, repositories["models"])
        server.add("datasets", DATASET, DATASET_REVISION, repositories["datasets"])
        yield server


@pytest.fixture
def environment(tmp_path: Path, clean_environment: dict[str, str]) -> dict[str, str]:
    """The environment of a user who has nothing yet."""
    ours = {"HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    ours |= {
        f"SLUICE_{name.upper()}": str(tmp_path / name) for name in ("datasets", "runs", "cache")
    }
    return clean_environment | ours


def sluice(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return waiting.run(
        [sys.executable, "-m", "cluster", "run", *words], cwd=CHECKOUT, env=environment
    )


def fetch(environment: dict[str, str], hub: Hub, *words: str) -> subprocess.CompletedProcess[str]:
    return sluice(environment | {"HF_ENDPOINT": hub.url}, "--fetch", *words)


def staged(tmp_path: Path) -> dict[str, Path]:
    """Return the packed texts by their split, the model's folder and the tokenizer's."""
    datasets = tmp_path / "datasets"
    [model] = [path for path in datasets.glob("models/*") if path.name[0] != "."]
    packed = {
        json.loads(p.read_text())["num_bytes"]: p.parent
        for p in datasets.glob("packed/*/*")
        if p.name == "meta.json"
    }
    return {"model": model, "train": packed[max(packed)], "validation": packed[min(packed)]}


Refusal = Callable[..., str]


@pytest.fixture
def refusal(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Refusal]:
    """Return a function that fetches from a hub in this process, and gives the one line of error.

    What the library takes from the environment when it is imported is set in its place.
    """
    from huggingface_hub import close_session, constants

    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "SLUICE_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NO_PROXY", "SLUICE_DATASETS"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    # It would try again for half a minute; we ask once, and say what happened.
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    close_session()

    def refused(endpoint: str, *words: str) -> str:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        job = ["--config", str(CHECKOUT / "configs/jobs/tinyllama.yaml")]
        with pytest.raises(UserError) as error:
            resolve.main(["train.tinyllama", "--online", "--", *job, *words])
        assert not list(tmp_path.glob("datasets/*/.*.unfinished"))
        assert "\n" not in str(error.value)
        return str(error.value)

    yield refused
    close_session()


# ---- the whole road ----


def test_fetched_once_the_job_trains_without_a_network(
    hub: Hub,
    repositories: dict[str, dict[str, bytes]],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    done = fetch(environment, hub, "--job", "tinyllama")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert f"staged in {tmp_path}/datasets; the job needs no network now" in done.stdout

    # The model is the server's, byte for byte; nothing that is not needed was asked for.
    found = staged(tmp_path)
    wanted = dict(repositories["models"])
    del wanted["pytorch_model.bin"]
    assert {path.name: path.read_bytes() for path in found["model"].iterdir()} == wanted
    asked = " ".join(hub.asked)
    assert "pytorch_model.bin" not in asked
    # Every request that names a revision names the pinned one.
    revisions = {MODEL_REVISION, DATASET_REVISION}
    named = [path.split("/") for path in hub.asked if "/resolve/" in path or "/revision/" in path]
    assert named
    assert all(revisions & set(path) for path in named), asked

    # The rows are lines of one text, empty ones too.
    meta = json.loads((found["train"] / "meta.json").read_text())
    text = "".join(row or "\n" for row in rows("train"))
    assert (meta["num_bytes"], meta["num_documents"]) == (len(text.encode()), 1)

    # All caches are in the place for caches; the home folder is as it was.
    assert (tmp_path / "cache/huggingface").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "datasets"]

    hub.asked.clear()
    done = fetch(environment, hub, "--job", "tinyllama")
    assert (done.returncode, done.stderr) == (0, "")
    assert "staging" not in done.stdout
    assert hub.asked == []

    # Without the server and the caches.
    shutil.rmtree(tmp_path / "cache")
    offline = environment | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    words = ["--max_steps", "2", "--log_every_steps", "1", "--data.sequence_length", "32"]
    words += ["--batch.global_batch_size", "2", "--schedule.warmup_steps", "0"]
    done = sluice(offline, "--job", "tinyllama", "--nproc", "1", "--", *words)
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs/tinyllama").iterdir()
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2]
    assert (run / "export/model.safetensors").exists()


# ---- downloads that are cut off ----


def test_a_connection_that_breaks_once_is_taken_up_again(
    hub: Hub,
    repositories: dict[str, dict[str, bytes]],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    parquet = f"{CONFIG}/train-00000-of-00001.parquet"
    hub.cuts = {"model.safetensors": 1, parquet: 1}
    done = fetch(environment, hub)
    assert done.returncode == 0, done.stderr
    assert hub.cuts == {"model.safetensors": 0, parquet: 0}
    model = staged(tmp_path)["model"]
    for name in ("model.safetensors", "config.json"):
        assert (model / name).read_bytes() == repositories["models"][name]
    assert not list(tmp_path.glob("datasets/*/.*.unfinished"))


def test_a_connection_that_keeps_breaking_ends_the_fetch_and_the_next_one_goes_on(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.cuts = {"model.safetensors": 100}
    done = fetch(environment, hub)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: model.name: the download of {MODEL} was interrupted (")
    assert error.endswith("run it again: complete files are not downloaded again")
    assert "Traceback" not in done.stderr
    # Half of a model is no model.
    assert not list(tmp_path.glob("datasets/models/[!.]*"))
    hub.cuts, hub.asked[:] = {}, []
    done = fetch(environment, hub)
    assert (done.returncode, done.stderr) == (0, "")
    got = [path.rpartition("/")[2] for path in hub.asked if path.startswith(f"GET /{MODEL}/")]
    assert got == ["model.safetensors"]
    assert ".cache" not in {path.name for path in staged(tmp_path)["model"].iterdir()}


# ---- refusals ----


@pytest.mark.parametrize(
    ("status", "step"),
    [
        (401, "check HF_TOKEN"),
        (404, "check HF_ENDPOINT"),
        (503, "try again later"),
    ],
)
def test_a_hub_that_refuses_is_one_line(hub: Hub, refusal: Refusal, status: int, step: str) -> None:
    hub.refusal = status
    said = refusal(hub.url)
    assert said == f"model.name: {hub.url} answers {status} for {MODEL}; {step}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.name", "a/b"], "model.name: .* has no model a/b that you can access; check"),
        (["--model.revision", "abc"], f"model.revision: {MODEL} has no revision abc; choose"),
        (["--data.name", "a/b"], "data.name: .* has no dataset a/b that you can access; check"),
        (["--data.revision", "abc"], f"data.revision: {DATASET} has no revision abc; choose"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line_with_its_setting(
    hub: Hub, refusal: Refusal, words: list[str], said: str
) -> None:
    tiny = [] if words[0].startswith("--model") else ["--model.preset", "tiny"]
    line = refusal(hub.url, *tiny, *words)
    assert re.match(said, line), line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--data.config", "x"],
            rf"error: data.name: {DATASET} \(x, train\) cannot be loaded: .*x",
        ),
        (["--data.text_column", "x"], "error: data.name: .*: has no column 'x'; choose from text"),
    ],
)
def test_what_a_dataset_does_not_have_is_one_line_and_exit_code_2(
    hub: Hub, environment: dict[str, str], tmp_path: Path, words: list[str], said: str
) -> None:
    done = fetch(environment, hub, "--", "--model.preset", "tiny", *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(said, line), line
    assert not list(tmp_path.glob("datasets/*/.*.unfinished"))


def test_no_network_is_one_line_after_one_request(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, name in (([], "model.name"), (["--model.preset", "tiny"], "data.name")):
        said = refusal("http://127.0.0.1:9", *words)
        assert said.startswith(f"{name}: http://127.0.0.1:9 cannot be reached ([Errno 111]")
        assert said.endswith("fetch where there is a network, or set HF_ENDPOINT to a mirror")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it to fetch" in refusal("http://127.0.0.1:9")


def test_a_hub_that_never_answers_is_given_up(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        said = refusal(url)
    assert said.startswith(f"model.name: {url} cannot be reached (timed out)")


def test_a_cache_of_another_revision_does_not_stand_in_for_the_pinned_one(
    hub: Hub,
    repositories: dict[str, dict[str, bytes]],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    # The library falls back on any revision in its cache when the files cannot be had.
    tiny = ["--", "--model.preset", "tiny"]
    other = "0123456789012345678901234567890123456789"
    hub.add("datasets", DATASET, other, repositories["datasets"])
    assert fetch(environment, hub, *tiny, "--data.revision", other).returncode == 0
    hub.add("datasets", DATASET, DATASET_REVISION, {"README.md": README.encode()})
    done = fetch(environment, hub, *tiny)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert f"could not be loaded at revision {DATASET_REVISION[:12]}" in said


def test_conversations_are_fetched_with_what_is_not_read_named(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    lines = (SAMPLES / "chat/train.jsonl").read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    stream = io.BytesIO()
    pq.write_table(pa.table({"source": ["ours"] * len(chats), "messages": chats}), stream)
    readme = b"---\nconfigs:\n- config_name: default\n  data_files: train-*\n---\n"
    files = {"README.md": readme, "train-0.parquet": stream.getvalue()}
    hub.add("datasets", "trl-lib/Capybara", DATASET_REVISION, files)
    done = fetch(environment, hub, "--job", "chat", "--", "--data.sequence_length", "64")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert (
        "data.name: trl-lib/Capybara: columns messages; not read: source; 31 conversations"
        in done.stdout
    )
    assert "one row in 20 of data.name: trl-lib/Capybara: columns messages" in done.stdout
    assert "; 1 conversation, 1 answer, " in done.stdout
