"""The loss: a sum over tokens, divided by the target tokens of the whole step.

Dividing once, by the count over all ranks and micro batches, makes 8 x 1 = 1 x 8 = 2 ranks x 4.
The mean of means, which most loops use, is a different loss whenever the parts differ in length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from runfolder.moments import reached
from train.engine import attention, head, models, signals
from train.engine.batches import Rows
from train.engine.distributed import agree, rank, world_size


class TokenLoss(nn.Module):
    """A language model whose forward pass returns the summed loss of its target tokens.

    Wrapped as a whole by every strategy, so that autocast and loss are the same under each.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.device_type = device.type
        self.bf16 = bf16
        self.whole_logits = not head.is_last(model)
        """Whether the model does more to the logits than its head."""
        self._score: head.Score = head.score

    def compile_parts(self) -> None:
        """Compile a decoder layer, once for all of them, and the loss.

        Not the model as a whole: that makes one graph of all layers, which takes several times as
        long at each start and restart, and in it transformers builds the causal mask in full
        (masking_utils.find_packed_sequence_indices cannot look at values while it is traced),
        which rules out the flash kernels and shared key-value heads.
        """
        for layer in models.layers(self.model):
            layer.compile(dynamic=False)
        self._score = torch.compile(head.score, dynamic=False)

    def forward(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss in nats, summed over targets, fp32, for inputs and labels of (B, T).

        Without labels, the logits of (B, T, V): sampling must go through `forward` too, where a
        sharded model gathers its weights. With positions of (B, T), an example begins wherever
        they restart at 0, and attends to itself alone.

        No attention mask is passed: the blocks are full, and a mask would cost the fast kernel.
        """
        packed = {} if positions is None else attention.packed_inputs(self.model, positions)
        scored = (
            None
            if labels is None or self.whole_logits
            else head.scoring(self.model.get_output_embeddings(), labels, self._score)
        )
        with (
            torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.bf16),
            scored or nullcontext(),
        ):
            found = self.model(input_ids=inputs, use_cache=False, **packed).logits
        return found if labels is None or scored else _cross_entropy(found, labels)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(
        logits.float().flatten(0, 1),
        labels.flatten(),
        ignore_index=head.IGNORED,
        reduction="sum",
    )


def global_target_tokens(labels: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the number of target tokens of a step, over all ranks and micro batches, on device."""
    count = torch.zeros((), dtype=torch.float64, device=device)
    for part in labels:
        count += (part != -100).sum()
    dist.all_reduce(count)
    return count


@dataclass(frozen=True)
class Validation:
    """What an evaluation found, over all target tokens of the validation data."""

    loss: float
    """Mean loss of a token in nats."""
    perplexity: float
    """exp(loss); comparable only between runs with the same tokenizer."""
    bits_per_byte: float
    """Comparable between tokenizers: the loss in bits over the bytes in UTF-8 of what is scored."""
    num_tokens: int

    def metrics(self) -> dict[str, float]:
        """Return the values for a line of metrics.jsonl."""
        return {
            "validation_loss": self.loss,
            "validation_perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


@torch.no_grad()
def evaluate(
    module: nn.Module,
    blocks: Rows,
    *,
    micro_batch_size: int,
    max_tokens: int | None,
    device: torch.device,
) -> Validation | None:
    """Score the validation data, or its first `max_tokens`; None if the run is asked to stop.

    Every target token counts once at any number of processes: ranks take turns at batches, and
    those past the end score nothing but still take part in the collectives of a sharded model.
    Leaves the model in eval mode.
    """
    module.eval()
    num_blocks = blocks.num_all
    if max_tokens is not None:
        num_blocks = min(num_blocks, -(-max_tokens // blocks.sequence_length))
    batches = -(-num_blocks // micro_batch_size)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for turn, first in enumerate(range(0, batches, world_size())):
        start = (first + rank()) * micro_batch_size
        indices = [
            i if i < num_blocks else blocks.num_all for i in range(start, start + micro_batch_size)
        ]
        batch = [torch.from_numpy(part).to(device) for part in blocks.rows(indices)]
        total += torch.stack([module(*batch).double(), (batch[1] != -100).sum().double()])
        reached("in-evaluation")
        # Asking costs a collective and, on a GPU, a sync: every tenth batch is often enough.
        if turn % 10 == 9 and agree(signals.received() is not None, device=device)[0]:
            return None
    dist.all_reduce(total)
    nats, num_tokens = (float(value) for value in total.tolist())
    loss = nats / num_tokens
    return Validation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / blocks.bytes_of(num_tokens),
        num_tokens=int(num_tokens),
    )
