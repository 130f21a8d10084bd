"""An encoder with a head that tells classes apart: loaded, asked, and written for transformers."""

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

# Batches of an evaluation between two looks at whether the cluster asks to stop.
LOOK_EVERY = 8


def load(
    folder: Path | None, tokenizer_folder: Path, classes: Sequence[str], seed: int
) -> PreTrainedModel:
    """Return the encoder of a folder, or a small random one, with a new head; fp32, on the CPU.

    The head's weights follow from `seed`. The names of the classes become part of its config.

    Raises:
        UserError: the folder holds no encoder, or one that knows fewer tokens than the tokenizer.
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
    # A head of the folder's own, of a model that was tuned, says other classes by these numbers.
    torch.manual_seed(seed)
    try:
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            base.config, dtype=torch.float32
        )
    except ValueError:
        raise UserError(
            f"model.name: {folder}: transformers has no classifier of a {base.config.model_type}; "
            "choose an encoder, such as sentence-transformers/all-MiniLM-L6-v2"
        ) from None
    inside = model.base_model.state_dict()
    known = base.state_dict()
    lacking = [name for name in inside if name not in known]
    if any(not name.startswith("pooler.") for name in lacking):
        raise UserError(
            f"model.name: {folder}: a classifier of a {base.config.model_type} has weights of its "
            f"own inside the encoder ({lacking[0]}); choose another encoder"
        )
    model.base_model.load_state_dict({n: known[n] for n in inside if n in known}, strict=False)
    if model.config.pad_token_id is None:
        raise UserError(
            f"model.name: {folder} has no padding token, so that texts of different lengths make "
            "no batch; choose an encoder, such as sentence-transformers/all-MiniLM-L6-v2"
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

    Each rank reads its share of the rows; dropout is off. None when a rank was asked to stop, and
    `may_stop`.
    """
    was_training = model.training
    model.eval()
    mine = share(len(rows))
    order = sorted(range(len(mine)), key=lambda place: (-len(rows[mine[place]]), place))
    found = np.empty((len(mine), int(model.config.num_labels or 0)), dtype=np.float32)
    # As many rounds on every rank, as they agree within; the share of rank 0 is the longest.
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

    It cuts texts to `max_length` tokens, as in training, when asked to (`truncation=True`). The
    folder appears whole; one of an earlier export is replaced.

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
