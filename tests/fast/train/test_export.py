"""Export: the folder is the trained model, to the last bit, with its tokenizer, or it is not."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from runfolder.checkpoints import published
from runfolder.errors import UserError
from train import export, tinyllama
from train.engine import arguments, checkpoint_reader, models, tokenization
from train.engine.durable import describe
from train.engine.errors import RunFailed
from train.engine.once import staged_path

TIED = ("--model.preset", "null", "--data.sequence_length", "32", "--model.name")


@pytest.fixture(scope="module", params=["untied", "tied"])
def trained(
    request: pytest.FixtureRequest,
    make_config: Callable[..., tinyllama.Config],
    device: torch.device,
    tied_model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a run of a model with and one without tied embeddings; not to be changed."""
    settings = [*TIED, str(tied_model_folder)] if request.param == "tied" else []
    settings += ["--max_steps", "4", "--checkpoint.every_steps", "2"]
    return train(tmp_path_factory.mktemp(request.param), make_config(*settings), device)


def train(run: Path, config: tinyllama.Config, device: torch.device) -> Path:
    """Train a run in the folder `run`, as the script does, without export; return `run`."""
    (run / "config.yaml").write_text(arguments.to_yaml(config))
    assert tinyllama.train(config, run, device, rehearse_stop=False) == "finished"
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the run."""
    return shutil.copytree(trained, tmp_path / "run")


def from_checkpoint(run: Path, step: int, device: torch.device) -> PreTrainedModel:
    """Return the model as a resumed run would have it."""
    folder = run / f"checkpoints/step-{step:08d}"
    built: PreTrainedModel = models.empty(folder).to_empty(device=device)
    built.tie_weights()
    # What is not in a checkpoint, because it follows from the shape.
    fresh = AutoModelForCausalLM.from_config(built.config)
    for (_, buffer), (_, source) in zip(built.named_buffers(), fresh.named_buffers(), strict=True):
        buffer.copy_(source)
    checkpoint_reader.load_weights(built, folder)
    return built.eval()


def logits(of: PreTrainedModel) -> torch.Tensor:
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return of(input_ids=tokens).logits


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def test_the_exported_model_gives_the_logits_of_the_trained_one_bit_for_bit(
    run: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(run)]) == 0
    assert capsys.readouterr().out == f"exported to {run / 'export'}\n"
    exported, expected = load(run / "export"), from_checkpoint(run, 4, device)
    assert {p.dtype for p in exported.parameters()} == {torch.float32}
    assert torch.equal(logits(exported), logits(expected))
    # And these are trained, not the weights that the run began with.
    assert not torch.equal(logits(exported), logits(from_checkpoint(run, 2, device)))
    assert exported.config.use_cache
    tied = exported.config.tie_word_embeddings
    embedding, head = exported.get_input_embeddings(), exported.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    on_disk = load_file(run / "export/model.safetensors")
    assert ("lm_head.weight" in on_disk) != tied


def test_the_exported_tokenizer_is_that_of_the_run(run: Path) -> None:
    export.main([str(run)])
    exported = AutoTokenizer.from_pretrained(run / "export")
    config = arguments.parse(
        tinyllama.Config, ["--config", str(run / "config.yaml")], prog="test", dry_run={}
    )
    assert config.staged is not None
    trained_with = tokenization.load(staged_path(config.staged.tokenizer))
    text = "The cluster waits: 12 naïve jobs,\n\tnone of them \N{GRINNING FACE}."
    ids = exported(text)["input_ids"]
    assert ids == trained_with.tokenizer.encode(text, add_special_tokens=False).ids
    assert exported.decode(ids) == text
    assert (exported.bos_token_id, exported.eos_token_id) == (
        trained_with.bos_id,
        trained_with.eos_id,
    )
    shape = json.loads((run / "export/config.json").read_text())
    assert shape["vocab_size"] >= len(exported)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_another_precision_is_stored_rounded_and_said_in_the_config(
    run: Path, device: torch.device, name: str
) -> None:
    dtype = getattr(torch, name)
    export.main([str(run), "--dtype", name])
    assert json.loads((run / "export/config.json").read_text())["dtype"] == name
    expected = dict(from_checkpoint(run, 4, device).named_parameters())
    stored = load_file(run / "export/model.safetensors")
    assert stored.keys() == expected.keys()
    for key, weight in stored.items():
        assert torch.equal(weight, expected[key].to(dtype)), key
    assert {p.dtype for p in load(run / "export").parameters()} == {dtype}


def test_an_output_that_exists_is_refused_and_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match=r"--output: .*mine exists; give a new folder"):
        export.main([str(run), "--output", str(tmp_path / "mine")])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert export.main([str(run), "--output", str(tmp_path / "new/folder")]) == 0
    assert (tmp_path / "new/folder/config.json").is_file()
    assert not (run / "export").exists()


def test_an_output_that_cannot_be_made_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"--output: .*config\.yaml is not a folder"):
        export.main([str(run), "--output", str(run / "config.yaml/export")])


def test_a_second_export_replaces_the_first_as_a_whole(run: Path) -> None:
    export.main([str(run)])
    (run / "export/left-over").touch()
    export.main([str(run), "--dtype", "bfloat16"])
    assert not (run / "export/left-over").exists()
    assert {w.dtype for w in load_file(run / "export/model.safetensors").values()} == {
        torch.bfloat16
    }
    assert [path.name for path in run.iterdir() if "export" in path.name] == ["export"]


def test_an_export_that_fails_leaves_the_earlier_one_and_the_next_succeeds(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.main([str(run)])
    before = {path.name: path.read_bytes() for path in (run / "export").iterdir()}

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", no_space)
        with pytest.raises(RunFailed, match=r"export: could not be written \(.*No space left"):
            export.main([str(run), "--dtype", "bfloat16"])
    assert [path.name for path in run.iterdir() if "export" in path.name] == ["export"]
    assert {path.name: path.read_bytes() for path in (run / "export").iterdir()} == before
    assert export.main([str(run), "--dtype", "bfloat16"]) == 0
    assert [path.name for path in run.iterdir() if "export" in path.name] == ["export"]


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_exported(
    run: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = run / "checkpoints/step-00000004/shard-00000-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert export.main([str(run)]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("checkpoint step-00000004 is damaged (shard-00000-of-00001")
    assert output[0].endswith("; trying the previous one")
    exported = load(run / "export")
    assert torch.equal(logits(exported), logits(from_checkpoint(run, 2, device)))
    # Looking for it changes nothing in the run.
    assert (run / "checkpoints/step-00000004").is_dir()


def test_a_run_without_a_whole_checkpoint_is_refused(run: Path) -> None:
    for folder in published(run / "checkpoints"):
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="has no complete checkpoint; let the run reach its"):
        export.main([str(run)])
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has no complete checkpoint"):
        export.main([str(run)])
    assert not (run / "export").exists()


@pytest.mark.parametrize("content", [None, "", "staged: null\n", "max_steps: 3\n", "[1]\n", "a: ["])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"is not a run folder: no config\.yaml of a run"):
        export.main([str(tmp_path)])


def test_a_run_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("staged: {tokenizer: t, train: rows/1, test: rows/2}\n")
    with pytest.raises(UserError, match=r"did not train a language model"):
        export.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_an_export_without_the_tokenizer_is_refused_not_made(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_DATASETS", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"SLUICE_DATASETS: .*elsewhere.* holds no tokenizer"):
        export.main([str(run)])
    assert not (run / "export").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_exported_files_have_the_modes_that_the_umask_says(run: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        export.main([str(run)])
    finally:
        os.umask(before)
    assert stat.S_IMODE((run / "export").stat().st_mode) == 0o777 & ~umask
    for path in (run / "export").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


@pytest.fixture
def chat_run(
    tied_model_folder: Path,
    make_config: Callable[..., tinyllama.Config],
    device: torch.device,
    tmp_path: Path,
) -> Path:
    """Return a run of a model whose generation settings are those of a chat model."""
    folder = shutil.copytree(tied_model_folder, tmp_path / "chat")
    (folder / "generation_config.json").write_text(json.dumps(CHAT))
    (tmp_path / "run").mkdir()
    config = make_config(*TIED, str(folder), "--max_steps", "1", "--checkpoint.every_steps", "1")
    return train(tmp_path / "run", config, device)


# As some of the field come: several ends, and what transformers would refuse to save.
CHAT = {"bos_token_id": 0, "eos_token_id": [1, 7, 11], "do_sample": False, "temperature": 0.6}


def test_an_export_has_the_generation_settings_of_its_base(chat_run: Path) -> None:
    export.main([str(chat_run)])
    written = json.loads((chat_run / "export/generation_config.json").read_text())
    assert written == {**written, **CHAT} and written.get("use_cache", True)
    exported: Any = load(chat_run / "export")
    assert exported.generation_config.eos_token_id == CHAT["eos_token_id"]
    # Each end ends a text, and after the prompt the model sees one token at a time.
    widths: list[int] = []
    exported.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prompt = torch.tensor([[3, 4, 5]])
    for end in (7, 11):
        head = exported.get_output_embeddings()
        chosen = torch.full((head.weight.shape[0],), -1e4)
        chosen[end] = 1e4
        handle = head.register_forward_hook(lambda m, args, out, chosen=chosen: out + chosen)
        assert exported.generate(prompt, max_new_tokens=5)[0].tolist() == [3, 4, 5, end]
        handle.remove()
    widths.clear()
    never = torch.zeros(head.weight.shape[0])
    never[CHAT["eos_token_id"]] = -1e4
    head.register_forward_hook(lambda m, args, out: out + never)
    assert exported.generate(prompt, max_new_tokens=5).shape == (1, 8)
    assert widths == [3, 1, 1, 1, 1]


def test_an_older_checkpoint_is_exported_with_its_cache_on(chat_run: Path) -> None:
    checkpoint_folder = chat_run / "checkpoints/step-00000001"
    (checkpoint_folder / "generation_config.json").unlink()
    config = json.loads((checkpoint_folder / "config.json").read_text())
    (checkpoint_folder / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    manifest = json.loads((checkpoint_folder / "manifest.json").read_text())
    del manifest["files"]["generation_config.json"]
    manifest["files"]["config.json"] = describe(checkpoint_folder / "config.json")
    (checkpoint_folder / "manifest.json").write_text(json.dumps(manifest))
    export.main([str(chat_run)])
    exported: Any = load(chat_run / "export")
    assert exported.config.use_cache and exported.generation_config.use_cache
    held = tensors_of(checkpoint_folder)
    assert all(torch.equal(held[name], p) for name, p in exported.named_parameters())


def test_a_head_that_config_ties_but_the_files_have_is_exported_as_it_was_trained(
    tied_model_folder: Path,
    make_config: Callable[..., tinyllama.Config],
    device: torch.device,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(tied_model_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "run").mkdir()
    run = train(tmp_path / "run", make_config(*TIED, str(folder), "--max_steps", "2"), device)
    export.main([str(run)])
    held, exported = tensors_of(run / "checkpoints/step-00000002"), load(run / "export")
    assert torch.equal(exported.get_output_embeddings().weight, held["lm_head.weight"])
    assert not torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"])
    assert not torch.equal(held["lm_head.weight"], weights["lm_head.weight"])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    (shard,) = folder.glob("shard-*.safetensors")
    held = load_file(shard)
    return {k.removeprefix("weight/"): v for k, v in held.items() if k.startswith("weight/")}
