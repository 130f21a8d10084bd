"""An encoder with a classification head: loading, prediction, and export for transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    PreTrainedModel,
)

from runfolder.errors import UserError
from runfolder.moments import reached
from train.engine import encoders, signals, tokenization
from train.engine.distributed import agree, world_size
from train.engine.durable import folder_at_once
from train.engine.shares import gather_in_order, share

# Batches of an evaluation between two checks whether the cluster asks to stop.
LOOK_EVERY = 8


def load(
    folder: Path | None, tokenizer_folder: Path, classes: Sequence[str], seed: int
) -> PreTrainedModel:
    """Return the encoder of a folder, or a small random one, with a new head; fp32, on the CPU.

    The head's weights depend only on `seed`. The class names become part of its config.

    Raises:
        UserError: the folder holds no encoder, or one with fewer tokens than the tokenizer.
    """
    names = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    vocab_size = tokenization.load(tokenizer_folder).vocab_size
    encoders.quiet()
    torch.manual_seed(seed)
    if folder is None:
        shape = encoders.tiny_shape(vocab_size)
        shape.update(names)
        return BertForSequenceClassification(shape)
    base = encoders.from_folder(folder, vocab_size)
    base.config.update(names)
    # A head in the folder, of a fine-tuned model, would be for other classes.
    torch.manual_seed(seed)
    try:
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            base.config, dtype=torch.float32
        )
    except ValueError:
        raise UserError(
            f"model.name: {folder}: transformers has no classifier for {base.config.model_type}; "
            "choose an encoder, such as sentence-transformers/all-MiniLM-L6-v2"
        ) from None
    inside = model.base_model.state_dict()
    known = base.state_dict()
    lacking = [name for name in inside if name not in known]
    if any(not name.startswith("pooler.") for name in lacking):
        raise UserError(
            f"model.name: {folder}: a classifier for {base.config.model_type} has extra weights "
            f"inside the encoder ({lacking[0]}); choose another encoder"
        )
    model.base_model.load_state_dict({n: known[n] for n in inside if n in known}, strict=False)
    if model.config.pad_token_id is None:
        raise UserError(
            f"model.name: {folder} has no padding token, so texts of different lengths cannot be "
            "batched; choose an encoder, such as sentence-transformers/all-MiniLM-L6-v2"
        )
    return model


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int,
    device: torch.device,
    bf16: bool = False,
    may_stop: bool = True,
) -> np.ndarray | None:
    """Return the probabilities, (N, C), of tokenized texts in order, on every rank; collective.

    Each rank reads its share of the rows; dropout is off. With `may_stop`, returns None if a rank
    was asked to stop.
    """
    was_training = model.training
    model.eval()
    mine = share(len(rows))
    order = sorted(range(len(mine)), key=lambda place: (-len(rows[mine[place]]), place))
    found = np.empty((len(mine), int(model.config.num_labels or 0)), dtype=np.float32)
    # As many rounds on every rank, as they are collective; the share of rank 0 is the longest.
    longest_share = -(-len(rows) // world_size())
    for number, start in enumerate(range(0, longest_share, batch_size)):
        if may_stop and number % LOOK_EVERY == 0:
            (stops,) = agree(signals.received() is not None, device=device)
            if stops:
                model.train(was_training)
                return None
        places = order[start : start + batch_size]
        if not places:
            continue
        ids, mask = encoders.pad(
            [rows[mine[place]] for place in places], model.config.pad_token_id or 0
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        found[places] = logits.float().softmax(-1).cpu().numpy()
        reached("in-evaluation")
    model.train(was_training)
    return gather_in_order(found, total=len(rows))


def export(model: PreTrainedModel, tokenizer_folder: Path, max_length: int, output: Path) -> None:
    """Write a folder that `transformers.pipeline("text-classification", output)` reads.

    With `truncation=True` it cuts texts to `max_length` tokens, as in training. The folder
    appears complete; one of an earlier export is replaced.

    Raises:
        RunFailed: it cannot be written.
    """
    with folder_at_once(output) as folder:
        model.save_pretrained(folder)
        tokenization.copy(tokenizer_folder, folder)
        settings = folder / "tokenizer_config.json"
        told = json.loads(settings.read_text(encoding="utf-8"))
        told |= {"model_max_length": max_length}
        settings.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
