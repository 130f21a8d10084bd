"""Checkpoints: complete or not there, few, whole under every accident, the same bytes each way."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runfolder.checkpoints import published
from runfolder.errors import UserError
from tests.waiting import HANGS_AFTER_S
from train import tinyllama
from train.engine import checkpoint, checkpoint_reader, models, strategy
from train.engine.checkpoint import Checkpoints
from train.engine.checkpoint_reader import find_damage
from train.engine.errors import RunFailed
from train.engine.loss import TokenLoss
from train.engine.once import staged_path
from train.engine.settings import OptimizerSettings, ShardCheckpointSettings
from train.engine.strategy.base import Strategy


@pytest.fixture
def trained(config: tinyllama.Config, device: torch.device) -> Strategy:
    """Return the preset `tiny` under ddp after one step."""
    wrapped = prepared(config, device)
    train_a_step(wrapped)
    return wrapped


def prepared(config: tinyllama.Config, device: torch.device) -> Strategy:
    """Return the preset `tiny` under ddp before its first step."""
    assert config.staged is not None
    built = models.build(config, staged_path(config.staged.tokenizer), seed=1)
    return strategy.prepare(
        TokenLoss(built, device, bf16=False),
        OptimizerSettings(lr=1e-2),
        name="ddp",
        device=device,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        resume=None,
    )


def train_a_step(wrapped: Strategy) -> None:
    tokens = torch.arange(17).reshape(1, 17)
    wrapped.accumulate((tokens[:, :-1], tokens[:, 1:]), scale=torch.tensor(1 / 16), last=True)
    wrapped.step()


def in_memory(wrapped: Strategy) -> dict[str, torch.Tensor]:
    """Return copies of all that a checkpoint must hold of the model and the optimizer."""
    found = {}
    for name, parameter in wrapped.module.model.named_parameters():
        found[f"weight/{name}"] = parameter.detach().clone()
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{key}/{name}"] = wrapped.optimizer.state[parameter][key].clone()
    return found


def assert_holds(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    read, names = checkpoint_reader.reader(folder)
    assert {f"weight/{name}" for name in names} == {k for k in expected if k.startswith("weight/")}
    for key, tensor in expected.items():
        state, _, name = key.partition("/")
        assert torch.equal(read(name, state), tensor), key


def checkpoints(folder: Path, *, keep: int = 2, asynchronous: bool = False) -> Checkpoints:
    return Checkpoints(folder, ShardCheckpointSettings(keep=keep, asynchronous=asynchronous))


def names(folder: Path) -> list[str]:
    """Return all entries of a checkpoints folder, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


# ---- what is saved ----


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_holds_weights_and_moments_to_the_last_bit(
    trained: Strategy, tmp_path: Path, asynchronous: bool
) -> None:
    saving = checkpoints(tmp_path, asynchronous=asynchronous)
    saving.save(1, trained, {"position": 8})
    saving.finish()
    folder = tmp_path / "step-00000001"
    assert_holds(folder, in_memory(trained))
    assert checkpoint_reader.read_state(folder) == {"format": 1, "step": 1, "position": 8}
    loaded = models.empty(folder).to_empty(device="cpu")
    checkpoint_reader.load_weights(loaded, folder)
    weights = dict(trained.module.model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_asynchronous_and_synchronous_saves_write_the_same_bytes(
    trained: Strategy, tmp_path: Path
) -> None:
    for name, asynchronous in (("sync", False), ("async", True)):
        saving = checkpoints(tmp_path / name, asynchronous=asynchronous)
        saving.save(1, trained, {"position": 8})
        saving.finish()
    one, other = (tmp_path / name / "step-00000001" for name in ("sync", "async"))
    assert names(one) == names(other)
    assert len(names(one)) == 5
    for name in names(one):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_training_goes_on_during_an_asynchronous_save_and_does_not_reach_it(
    trained: Strategy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, write = threading.Event(), checkpoint.save_file

    def slow(*arguments: Any) -> dict[str, Any]:
        assert go_on.wait(HANGS_AFTER_S)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    saving = checkpoints(tmp_path, asynchronous=True)
    at_save = in_memory(trained)
    saving.save(1, trained, {})
    assert saving.pending
    assert saving.writing
    train_a_step(trained)
    assert not torch.equal(
        in_memory(trained)["weight/lm_head.weight"], at_save["weight/lm_head.weight"]
    )
    assert published(tmp_path) == [], "published before it was written"
    go_on.set()
    saving.finish()
    assert not saving.pending
    assert_holds(tmp_path / "step-00000001", at_save)


def test_the_next_save_publishes_the_one_before(trained: Strategy, tmp_path: Path) -> None:
    saving = checkpoints(tmp_path, asynchronous=True)
    saving.save(1, trained, {})
    saving.save(2, trained, {})
    assert [path.name for path in published(tmp_path)] == ["step-00000001"]
    saving.finish()
    assert [path.name for path in published(tmp_path)] == ["step-00000002", "step-00000001"]


def test_a_run_that_is_stopped_before_its_first_step_can_be_saved(
    config: tinyllama.Config, device: torch.device, tmp_path: Path
) -> None:
    wrapped = prepared(config, device)
    checkpoints(tmp_path).save(0, wrapped, {})
    read, found = checkpoint_reader.reader(tmp_path / "step-00000000")
    for name, parameter in wrapped.module.model.named_parameters():
        assert torch.equal(read(name, "weight"), parameter)
        assert torch.equal(read(name, "exp_avg"), torch.zeros_like(parameter))
        assert torch.equal(read(name, "exp_avg_sq"), torch.zeros_like(parameter))
    assert len(found) == len(list(wrapped.module.parameters()))


def test_only_the_newest_are_kept_and_latest_names_the_last(
    trained: Strategy, tmp_path: Path
) -> None:
    saving = checkpoints(tmp_path, keep=3)
    for step in (1, 2, 9, 10, 100):
        saving.save(step, trained, {})
    assert names(tmp_path) == ["latest", "step-00000009", "step-00000010", "step-00000100"]
    assert (tmp_path / "latest").read_text() == "step-00000100\n"
    newest = saving.newest()
    assert newest is not None
    assert newest.name == "step-00000100"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_files_and_folders_have_the_modes_that_the_umask_says(
    trained: Strategy, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        checkpoints(tmp_path / "checkpoints").save(1, trained, {})
    finally:
        os.umask(before)
    paths = [tmp_path / "checkpoints", *(tmp_path / "checkpoints").rglob("*")]
    assert len(paths) == 8
    for path in paths:
        full = 0o777 if path.is_dir() else 0o666
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(full & ~umask), path


# ---- accidents ----


def test_what_a_killed_attempt_left_is_cleaned_up_and_the_rest_is_not(
    trained: Strategy, tmp_path: Path
) -> None:
    checkpoints(tmp_path).save(1, trained, {})
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000000.deleted")
    (tmp_path / ".latest.tmp").write_text("step-0000")
    (tmp_path / "notes.txt").write_text("the user's own")
    (tmp_path / "step-00000003.damaged").mkdir()
    newest = checkpoints(tmp_path).newest()
    assert newest == tmp_path / "step-00000001"
    assert names(tmp_path) == ["latest", "notes.txt", "step-00000001", "step-00000003.damaged"]


class Killed(BaseException):
    """Stands for kill -9: nothing that would clean up may run."""


def test_a_deletion_that_is_cut_off_leaves_no_half_checkpoint(
    trained: Strategy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = checkpoints(tmp_path)
    for step in (1, 2):
        saving.save(step, trained, {})

    def cut_off(path: Path, ignore_errors: bool = False) -> None:
        next(path.glob("shard-*")).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", cut_off)
        with pytest.raises(Killed):
            saving.save(3, trained, {})
    assert [path.name for path in published(tmp_path)] == ["step-00000003", "step-00000002"]
    assert [find_damage(path) for path in published(tmp_path)] == [None, None]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    checkpoints(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000003"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_cannot_be_written_is_one_error_and_the_earlier_checkpoint_stays(
    trained: Strategy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
) -> None:
    saving = checkpoints(tmp_path, asynchronous=asynchronous)
    saving.save(1, trained, {})
    saving.finish()

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", no_space)
    with pytest.raises(RunFailed, match=r"checkpoint 2 could not be written \(rank 0: .*No space"):
        saving.save(2, trained, {})
        saving.finish()
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert (tmp_path / "latest").read_text() == "step-00000001\n"
    assert find_damage(tmp_path / "step-00000001") is None


# ---- damage ----


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["config.json", "state.json", "shard-00000-of-00001.safetensors"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_bit, "does not match its sha256"),
        (cut_short, "bytes instead of"),
        (Path.unlink, "is missing"),
    ],
)
def test_damage_to_any_file_is_found_and_named(
    saved: Path, name: str, damage: Callable[[Path], None], words: str
) -> None:
    damage(saved / name)
    problem = find_damage(saved)
    assert problem is not None
    assert problem.startswith(f"{name} ")
    assert words in problem


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"files": null}', '{"files": []}', "\udcff"]
)
def test_a_spoilt_manifest_is_damage(saved: Path, content: str) -> None:
    (saved / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert find_damage(saved) == "manifest.json cannot be read"


def test_ranks_that_share_the_hashing_find_every_damage_together(saved: Path) -> None:
    for parts in (1, 2, 3, 5):
        assert [find_damage(saved, part, parts) for part in range(parts)] == [None] * parts
    for name in ("config.json", "state.json", "shard-00000-of-00001.safetensors"):
        whole = (saved / name).read_bytes()
        flip_a_bit(saved / name)
        for parts in (1, 2, 3, 5):
            found = [find_damage(saved, part, parts) for part in range(parts)]
            assert len([problem for problem in found if problem]) == 1, (name, parts)
        (saved / name).write_bytes(whole)


def test_a_damaged_checkpoint_is_set_aside_under_a_free_name_and_said(
    trained: Strategy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = checkpoints(tmp_path)
    for step in (1, 2):
        saving.save(step, trained, {})
    (tmp_path / "step-00000002.damaged").mkdir()
    flip_a_bit(tmp_path / "step-00000002/state.json")
    assert saving.newest() == tmp_path / "step-00000001"
    assert capsys.readouterr().out == (
        "checkpoint step-00000002 is damaged (state.json does not match its sha256); trying the "
        "previous one\n"
    )
    assert (tmp_path / "step-00000002.damaged.2/manifest.json").is_file()
    assert (tmp_path / "latest").read_text() == "step-00000001\n"
    flip_a_bit(tmp_path / "step-00000001/state.json")
    # Nor later, when all have been set aside.
    for _ in range(2):
        with pytest.raises(RunFailed, match="none of the 3 checkpoints is complete"):
            saving.newest()


def test_a_folder_without_checkpoints_is_a_new_run(device: torch.device, tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "checkpoints").newest() is None


def test_a_checkpoint_of_a_newer_format_is_refused(saved: Path) -> None:
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"format": 2}))
    with pytest.raises(UserError, match="has format 2; this Sluice reads up to 1"):
        checkpoint_reader.read_state(saved)


@pytest.fixture(scope="module")
def one_saved(
    config: tinyllama.Config, device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a checkpoint that tests must not change."""
    wrapped = prepared(config, device)
    train_a_step(wrapped)
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints(folder).save(1, wrapped, {})
    return folder / "step-00000001"


@pytest.fixture
def saved(one_saved: Path, tmp_path: Path) -> Iterator[Path]:
    """Return a checkpoint to damage."""
    yield shutil.copytree(one_saved, tmp_path / one_saved.name)


# ---- the ranks' shares ----


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_the_ranks_write_about_the_same_amount_each(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    # The shapes of a model with a large embedding, in the order of its layers.
    sizes = {"embed": 4000, "norm": 8, "head": 4000}
    sizes |= {f"layer{n}.{m}": s for n in range(12) for m, s in (("q", 256), ("up", 700), ("n", 8))}
    parameters = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    wrapped: Any = SimpleNamespace(parameters=lambda: iter(parameters.items()))
    monkeypatch.setattr(checkpoint, "world_size", lambda: num_ranks)
    owners = checkpoint._owners(wrapped)
    assert set(owners) == set(sizes)
    load = [0] * num_ranks
    for name, owner in owners.items():
        load[owner] += sizes[name]
    # No way of sharing is better than the largest parameter alone or an even share.
    best = max(*sizes.values(), sum(sizes.values()) / num_ranks)
    assert max(load) <= 1.05 * best
    # Each rank computes it for itself, whatever the order in which it meets the parameters.
    wrapped.parameters = lambda: reversed(parameters.items())
    assert checkpoint._owners(wrapped) == owners


def test_parameters_that_zero3_has_emptied_count_with_their_full_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large, others = torch.empty(0), [torch.empty(10) for _ in range(4)]
    large.ds_numel = 40  # type: ignore[attr-defined]
    parameters = {"large": large, **{f"small{n}": other for n, other in enumerate(others)}}
    wrapped: Any = SimpleNamespace(parameters=lambda: iter(parameters.items()))
    monkeypatch.setattr(checkpoint, "world_size", lambda: 2)
    assert checkpoint._owners(wrapped) == {
        "large": 0, "small0": 1, "small1": 1, "small2": 1, "small3": 1,
    }  # fmt: skip
