"""A new head on a pretrained encoder: a classifier, its blocks, and its export."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from train.engine import encoders, models, tokenization
from train.engine.checkpoint_reader import reader
from train.engine.durable import folder_at_once

# Measured, not trained, but saved in a checkpoint with the trained parameters.
STATISTICS = ("head.mean", "head.deviation")


class Head(nn.Module):
    """Logits (B, C) of vectors (B, D): each dimension standardised, then one linear layer."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.deviation = nn.Parameter(torch.ones(width), requires_grad=False)
        # Zeros are as good as any start: without a hidden layer the loss is convex.
        self.weight = nn.Parameter(torch.zeros(num_classes, width))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, vectors_BD: torch.Tensor) -> torch.Tensor:
        """Return the logits, (B, C)."""
        # Under autocast a linear layer would be in bf16; this one is small.
        with torch.autocast(vectors_BD.device.type, enabled=False):
            standardised_BD = (vectors_BD.float() - self.mean) / self.deviation
            return nn.functional.linear(standardised_BD, self.weight, self.bias)

    @torch.no_grad()
    def measure(self, vectors_ND: torch.Tensor) -> None:
        """Take mean and standard deviation from the vectors of the training rows.

        A dimension that is nearly constant, such as one that MiniLM never uses, is only
        centred: divided by next to nothing, its rounding errors would swamp the others, and make
        the gradient of the encoder thousands of times too large.
        """
        self.mean.copy_(vectors_ND.mean(0))
        deviation_D = vectors_ND.std(0, correction=0)
        is_constant = deviation_D < 1e-3 * deviation_D.mean()
        self.deviation.copy_(deviation_D.masked_fill(is_constant, 1.0))

    @torch.no_grad()
    def folded(self) -> dict[str, torch.Tensor]:
        """Return weight (C, D) and bias (C,) of the same function of unstandardised vectors."""
        weight = self.weight / self.deviation
        return {"weight": weight, "bias": self.bias - weight @ self.mean}


class Classifier(nn.Module):
    """An encoder with a head."""

    def __init__(self, encoder: PreTrainedModel, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = Head(encoder.config.hidden_size, num_classes)

    def forward(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Return the logits, (B, C)."""
        return self.head(encoders.embed(self.encoder, ids_BT, mask_BT))

    @torch.no_grad()
    def probabilities(self, vectors_ND: torch.Tensor) -> torch.Tensor:
        """Return the probabilities (N, C), on the CPU, of vectors of the encoder."""
        return self.head(vectors_ND.to(self.head.weight.device)).softmax(-1).cpu()

    def blocks(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each block: the layers from the top, then the rest."""
        blocks = [list(layer.parameters()) for layer in reversed(models.layers(self.encoder))]
        in_layers = {id(parameter) for block in blocks for parameter in block}
        return [*blocks, [p for p in self.encoder.parameters() if id(p) not in in_layers]]


def load_trained(model: Classifier, checkpoint: Path) -> None:
    """Load the trained parameters of a checkpoint over the pretrained weights."""
    read, names = reader(checkpoint)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(read(name, "weight"))


def export(
    model: Classifier, classes: list[str], max_length: int, tokenizer_folder: Path, output: Path
) -> None:
    """Write encoder, head.safetensors, classifier.json and tokenizer to `output`.

    The head takes the unstandardised pooled vectors; classifier.json has the classes in the order
    of its logits, the number of tokens read per text, and the pooling. The folder of an earlier
    export is replaced.

    Raises:
        RunFailed: it could not be written.
    """
    # transformers imports DeepSpeed when it saves; that must not look for a GPU or compile.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    disable_progress_bar()
    with folder_at_once(output) as folder:
        model.encoder.save_pretrained(folder)
        head = {name: tensor.cpu().contiguous() for name, tensor in model.head.folded().items()}
        save_file(head, folder / "head.safetensors")
        description = {
            "classes": classes,
            "max_length": max_length,
            "pooling": encoders.pooling_of(model.encoder).mode,
        }
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (folder / "classifier.json").write_text(text, encoding="utf-8")
        tokenization.copy(tokenizer_folder, folder)
