"""Write a checkpoint, of any strategy, as a Hugging Face model folder.

make export RUN=tinyllama/20261122-153402-ab12cd
python -m train.export runs/tinyllama/20261122-153402-ab12cd --dtype bfloat16
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from runfolder.checkpoints import published
from runfolder.errors import UserError
from train.engine import tokenization
from train.engine.durable import folder_at_once
from train.engine.errors import check_writable_folder, run_to_exit
from train.engine.once import staged_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def export(
    checkpoint: Path, tokenizer_folder: Path, output: Path, dtype: torch.dtype | None = None
) -> None:
    """Write weights (fp32 unless `dtype` says otherwise), config and tokenizer to `output`.

    A checkpoint of adapters (LoRA) is merged with its base model; the adapters are also written,
    in peft's format and in fp32, to a folder beside it: `output` with the suffix -adapter. Each
    folder appears at once and complete; one of an earlier export is replaced.
    """
    import torch

    # transformers imports DeepSpeed when it saves; that must not look for a GPU or compile.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    from train.engine import lora
    from train.engine.checkpoint_reader import GENERATION, read_state

    disable_progress_bar()
    dtype = dtype or torch.float32
    if read_state(checkpoint).get("method") == "lora":
        adapted = lora.from_checkpoint(checkpoint, tokenizer_folder)
        with folder_at_once(output.with_name(f"{output.name}-adapter")) as folder:
            lora.save_adapters(adapted, folder)
        # Added in fp32, then rounded once.
        model = adapted.merge_and_unload().to(dtype)
    else:
        model = _full_model(checkpoint, dtype)
    model.config.dtype = dtype
    with folder_at_once(output) as folder:
        known = checkpoint / GENERATION
        if not known.exists():
            # From an earlier version, which switched the cache off during training.
            model.config.use_cache = model.generation_config.use_cache = True
        else:
            # As in the base model: transformers refuses to save some configs that it loads.
            model.generation_config = GenerationConfig()
        model.save_pretrained(folder, max_shard_size="5GB")
        if known.exists():
            shutil.copyfile(known, folder / GENERATION)
        tokenization.copy(tokenizer_folder, folder)


def _full_model(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    from train.engine.checkpoint_reader import read_buffers, reader
    from train.engine.models import empty

    read, names = reader(checkpoint)
    model = empty(checkpoint)
    weights = {name: read(name, "weight").to(dtype) for name in names}
    weights |= read_buffers(checkpoint)
    _, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    assert not unexpected, unexpected
    lacking = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if lacking:
        raise UserError(
            f"{checkpoint}: lacks {lacking[0]}, as do all checkpoints of an earlier version; "
            "start a new run"
        )
    # A weight that another one was tied over would be lost.
    assert set(names) <= {name for name, _ in model.named_parameters()}
    return model


def newest_checkpoint(run_folder: Path) -> Path:
    """Return the newest complete checkpoint of a run.

    Raises:
        UserError: it has none.
    """
    from train.engine.checkpoint_reader import find_damage

    for folder in published(run_folder / "checkpoints"):
        problem = find_damage(folder)
        if problem is None:
            return folder
        print(f"checkpoint {folder.name} is damaged ({problem}); trying the previous one")
    raise UserError(f"{run_folder}: has no complete checkpoint; let the run reach its first one")


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="train/export.py", description="Write a Hugging Face folder.")
    parser.add_argument("run_folder", type=str)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=str, default="", help="default: RUN_FOLDER/export")
    options = parser.parse_args(argv)
    run_folder = Path(options.run_folder)
    output = Path(options.output) if options.output else run_folder / "export"
    for folder in (output, output.with_name(f"{output.name}-adapter")):
        if options.output and folder.exists():
            raise UserError(f"--output: {folder} exists; give a new folder")
    check_writable_folder(output.parent, "--output")
    try:
        config = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
        tokenizer_folder = staged_path(config["staged"]["tokenizer"])
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        raise UserError(f"{run_folder}: is not a run folder: no config.yaml of a run") from None
    if "validation" not in config["staged"]:
        raise UserError(
            f"{run_folder}: did not train a language model; its chapter in docs/ says what the "
            "script exports, and to which folder"
        )
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise UserError(
            f"SLUICE_DATASETS: {tokenizer_folder} holds no tokenizer; give the datasets folder "
            "of the run"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    export(newest_checkpoint(run_folder), tokenizer_folder, output, getattr(torch, options.dtype))
    print(f"exported to {output}")
    return 0


if __name__ == "__main__":
    run_to_exit(main)
