"""LoRA: a frozen model with small trainable matrices beside its own, by the peft library.

A layer W of (out, in) becomes W + alpha / rank * B A, with A of (rank, in) and B of (out, rank);
only A and B train. B begins as zeros, so training starts from the model as it was. Hu et al. 2021,
arXiv:2106.09685.

Imports torch and peft only to make or read a model: settings are checked before that.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runfolder.errors import UserError
from train.engine.presets import PRESETS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
# The smaller side of each kind of layer, by the last part of its name (q_proj).
Sides = dict[str, int]


@dataclass(kw_only=True)
class LoraSettings:
    """The adapters; for --method lora."""

    rank: int = 8
    """The inner size of an adapter; its parameters grow with it."""
    alpha: float = 16.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """On an adapter's input, in training. With 0, the loss is the same on any number of
    processes."""
    target_modules: str = ALL_LINEAR
    """The layers that get adapters: all-linear (in the decoder), or names: q_proj,v_proj."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank: {self.rank} is not positive")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"lora.alpha: {self.alpha} is not a positive number")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout: {self.dropout} is not in [0, 1)")
        if not all(self.targets):
            raise UserError(
                f"lora.target_modules: '{self.target_modules}' contains an empty name; give "
                f"{ALL_LINEAR}, or names such as q_proj,v_proj"
            )

    @property
    def targets(self) -> list[str]:
        """The names in `target_modules`."""
        return [name.strip() for name in self.target_modules.split(",")]


def check(settings: LoraSettings, sides: Sides, model_name: str) -> None:
    """Raise `UserError` if the model has no such layer, or one that is smaller than the rank."""
    targets = list(sides) if settings.targets == [ALL_LINEAR] else settings.targets
    for name in targets:
        if name not in sides:
            raise UserError(
                f"lora.target_modules: {model_name} has no layer '{name}'; it has "
                f"{', '.join(sorted(sides))} (or {ALL_LINEAR})"
            )
        if settings.rank > sides[name]:
            raise UserError(
                f"lora.rank: {settings.rank} is more than {sides[name]}, the smaller side of "
                f"{name} in {model_name}; choose a rank far below that"
            )


def sides_of_folder(folder: Path) -> Sides:
    """Return the matrices of a model folder's decoder layers, by the names in its weight files."""
    from safetensors import safe_open

    found: Sides = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as weights:
            for key in weights.keys():  # noqa: SIM118
                # Inside a numbered layer: neither the embedding nor the head, which may be tied.
                name = re.fullmatch(r".*\.\d+\.(?:.*\.)?([^.]+)\.weight", f".{key}")
                shape = weights.get_slice(key).get_shape()
                if name and len(shape) == 2:
                    found[name[1]] = min(*shape, found.get(name[1], shape[0]))
    return found


def sides_of_preset(preset: str) -> Sides:
    """Return the matrices of a preset's decoder layers (of a Llama)."""
    shape = PRESETS[preset]
    hidden, inner = shape.hidden_size, min(shape.hidden_size, shape.intermediate_size)
    keys = hidden * shape.num_key_value_heads // shape.num_attention_heads
    attention = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
    return attention | {"gate_proj": inner, "up_proj": inner, "down_proj": inner}


def add_adapters(
    model: PreTrainedModel, settings: LoraSettings, *, seed: int, name: str, revision: str | None
) -> Any:
    """Return `model` (on the CPU) frozen, with adapters that train; a peft.PeftModel.

    `name` and `revision` are recorded in the adapter's folder as its base model.

    Raises:
        UserError: the model has none of the layers.
    """
    import peft
    import torch
    from transformers.pytorch_utils import Conv1D

    chosen: Any = ALL_LINEAR if settings.targets == [ALL_LINEAR] else settings.targets
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=settings.rank,
        # peft annotates it as int, but divides it.
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=chosen,
        # GPT-2's layers store their matrices transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    # The first halves (A) are drawn at random; the same for a seed, on every rank.
    torch.manual_seed(seed)
    # peft uses a name that transformers has deprecated; the user cannot fix that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # About peft's own settings for experts, which it creates and then does not use.
    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"lora.target_modules: {error}") from None
    # get_peft_model records the path of the model, which only exists on this machine.
    config.base_model_name_or_path, config.revision = name, revision
    return adapted


def describe_adapted(model: Any) -> str:
    """Describe which layers have adapters, and which other matrices have none.

    peft's all-linear includes the stacked matrices of experts, and then leaves out others that it
    includes elsewhere (DeepSeek-V3's shared experts). Empty for a model without adapters.
    """
    adapted: set[str] = set()
    left: dict[str, int] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            # A tensor of experts has a wrapper of its own around those of the others.
            last = name.replace(".base_layer", "").rpartition(".")[2]
            of = getattr(module, "parameter_name", None)
            adapted.add(last if of in (None, "weight") else f"{last}.{of}")
    if not adapted:
        return ""
    # The layers are numbered; embedding and head are left alone on purpose.
    layer = re.compile(r"\.\d+\.(.+)$")
    for name, parameter in model.named_parameters():
        place = layer.search(name)
        if place and parameter.ndim > 1 and "lora_" not in name and "base_layer" not in name:
            plain = re.sub(r"\.\d+\.", ".", place[1]).removesuffix(".weight")
            left[plain] = left.get(plain, 0) + parameter.numel()
    told = f"; adapters on {', '.join(sorted(adapted))}"
    if left:
        total = sum(p.numel() for p in model.parameters())
        told += f"; none on {', '.join(sorted(left))} ({sum(left.values()) / total:.0%} of all)"
    return told


def describe(settings: LoraSettings) -> dict[str, Any]:
    """Return the settings that the weights depend on, for a checkpoint."""
    return {f"lora.{key}": value for key, value in asdict(settings).items() if key != "dropout"}


def from_checkpoint(checkpoint: Path, tokenizer_folder: Path) -> Any:
    """Return the peft.PeftModel that a checkpoint of adapters stands for, in fp32 on the CPU.

    Raises:
        UserError: the base model is no longer where it was, or has changed.
    """
    from train.engine import models
    from train.engine.checkpoint_reader import load_weights, read_state
    from train.engine.once import staged_path

    state = read_state(checkpoint)
    base = state["base"]
    if base["preset"]:
        model = models.from_preset(base["preset"], tokenizer_folder, state["seed"])
    else:
        folder = staged_path(base["staged"])
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{checkpoint}: holds adapters of {base['name']}, which is not at {folder}; set "
                "SLUICE_DATASETS to the datasets folder of the run"
            )
        model = models.from_folder(folder)
    values = {field: state[f"lora.{field}"] for field in ("rank", "alpha", "target_modules")}
    adapted = add_adapters(
        model,
        LoraSettings(**values),
        seed=state["seed"],
        name=base["name"],
        revision=base["revision"],
    )
    if base_sha256(adapted) != state["weights under the adapters"]:
        raise UserError(
            f"{checkpoint}: holds adapters of {base['name']}, whose weights have changed since; "
            "restore the weights that the run used"
        )
    load_weights(adapted, checkpoint)
    return adapted


def base_sha256(adapted: Any) -> str:
    """Return the hash of the frozen weights under the adapters."""
    from train.engine.models import weights_sha256

    return weights_sha256(adapted, frozen_only=True)


def save_adapters(adapted: Any, folder: Path) -> None:
    """Write the adapters in peft's format: adapter_config.json, adapter_model.safetensors."""
    # "auto" would ask the hub for the model's vocabulary; no adapter touches the embedding.
    adapted.save_pretrained(folder, save_embedding_layers=False)
    # An empty model card.
    (folder / "README.md").unlink(missing_ok=True)
