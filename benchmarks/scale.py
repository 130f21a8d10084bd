"""How far each strategy scales, on paper: memory, traffic and time of a step.

    python benchmarks/scale.py

Formulas only; docs/scale.md is its output and says where they come from. What travels at two and
four processes is counted by tests/real/train/test_wire.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the checkout is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.engine.memory import gathered, held
from train.engine.presets import PRESETS, Preset

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SIZES = (1, 8, 64, 256, 1024)
GPUS_PER_NODE = 8
# Tokens of a step (Touvron et al. 2023, arXiv:2307.09288, section 2.2), of a sequence, and of what
# one GPU takes at once.
STEP_TOKENS, SEQUENCE, MICRO_TOKENS = 4 * 2**20, 4096, 16 * 2**10
# Dense bf16 of an H100 or H200, in FLOP/s, and the share of it that a step without waiting gets:
# an assumption (PaLM reached 0.46, arXiv:2204.02311, table 3), to be replaced by a measurement.
PEAK, SHARE = 989.4e12, 0.4
# Bytes per second: out of a node at 400 and 100 Gbit/s, and of one GPU within it (NVLink 4).
NETWORKS = {"400 Gbit/s": 50e9, "100 Gbit/s": 12.5e9}
NVLINK = 450e9


def _llama2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> Preset:
    return Preset(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


MODELS = {
    "TinyLlama, 1.1 B": PRESETS["tinyllama-1.1b"],
    "Llama 2, 7 B": _llama2(4096, 11008, 32, 32, 32),
    "Llama 2, 70 B": _llama2(8192, 28672, 80, 64, 8),
}


def num_parameters(shape: Preset) -> tuple[int, int]:
    """Return the parameters of a Llama: of a layer, and of embedding, head and last norm."""
    d, f = shape.hidden_size, shape.intermediate_size
    shared = d * shape.num_key_value_heads // shape.num_attention_heads
    layer = 2 * d * d + 2 * d * shared + 3 * d * f + 2 * d
    return layer, 2 * shape.vocab_size * d + d


def total_parameters(shape: Preset) -> int:
    """Return all parameters of a Llama."""
    layer, rest = num_parameters(shape)
    return layer * shape.num_hidden_layers + rest


def micro_batches(world_size: int) -> int:
    """Return how many micro batches a step has on each GPU."""
    return max(1, STEP_TOKENS // world_size // MICRO_TOKENS)


def memory(strategy: str, shape: Preset, world_size: int) -> float:
    """Return the bytes that a GPU has in tensors in a step with bf16, without activations."""
    total = total_parameters(shape)
    own = held(total, strategy, world_size, bf16=True)
    gradients = own.accumulated if micro_batches(world_size) > 1 else own.share * 4 * total
    return own.lasting + gradients + gathered(strategy, *num_parameters(shape), bf16=True)


@dataclass(frozen=True)
class Wire:
    """What a strategy sends in a step, in bytes a parameter of what is sent at once."""

    reduced: int
    """Gradients: as an all-reduce under ddp, as a reduce-scatter otherwise."""
    gathered: tuple[int, ...]
    """Weights, for each time that they are gathered."""
    reduces_each_micro_batch: bool
    gathers_each_micro_batch: bool


def wire(strategy: str, precision: str = "bf16", reduce_dtype: str = "auto") -> Wire:
    """Return what a strategy sends; docs/strategies.md has the settings."""
    reduced = 2 if precision == "bf16" and reduce_dtype == "auto" else 4
    split = 4 if precision == "fp32" or (strategy, reduced) == ("zero3", 4) else 2
    gathered = {"ddp": (), "zero1": (4,), "zero2": (4,)}.get(strategy, (split, split))
    return Wire(reduced, gathered, strategy in ("zero2", "zero3"), strategy in ("zero3", "fsdp2"))


def sent(strategy: str, world_size: int, of: Wire, *, micro_batches: int, gloo: bool) -> float:
    """Return the bytes that one process sends in a step, for each parameter.

    In a ring of n, an all-reduce sends 2 (n - 1) / n of its bytes from each, a reduce-scatter or an
    all-gather half of that (Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002). gloo's own
    reduce-scatter is an all-reduce, which DeepSpeed's stage 3 goes around.
    """
    ring = (world_size - 1) / world_size
    doubled = strategy == "ddp" or (gloo and strategy != "zero3")
    reduces = micro_batches if of.reduces_each_micro_batch else 1
    gathers = micro_batches if of.gathers_each_micro_batch else 1
    return ring * (of.reduced * (2 if doubled else 1) * reduces + sum(of.gathered) * gathers)


def flops(shape: Preset) -> float:
    """Return the FLOPs of a token: 6 N + 12 L d T (arXiv:2204.02311, appendix B)."""
    layer, _ = num_parameters(shape)
    multiplied = layer * shape.num_hidden_layers + shape.vocab_size * shape.hidden_size
    return 6 * multiplied + 12 * shape.num_hidden_layers * shape.hidden_size * SEQUENCE


def step(strategy: str, shape: Preset, world_size: int, network: float) -> tuple[float, float]:
    """Return the seconds that a step computes, and those in which it sends.

    A ring leaves each node once, so that the network of a node carries what one GPU sends.
    """
    computes = flops(shape) * STEP_TOKENS / world_size / (PEAK * SHARE)
    count = micro_batches(world_size)
    each = sent(strategy, world_size, wire(strategy), micro_batches=count, gloo=False)
    bandwidth = NVLINK if world_size <= GPUS_PER_NODE else network
    return computes, each * total_parameters(shape) / bandwidth


def largest(strategy: str, shape: Preset, network: float) -> int:
    """Return how many GPUs (8, 16, ... 1,024) a step can use before it sends for longer."""
    size = GPUS_PER_NODE
    while size < SIZES[-1]:
        computes, sends = step(strategy, shape, 2 * size, network)
        if sends > computes:
            break
        size *= 2
    return size


def tables() -> str:
    """Return the tables of docs/scale.md."""
    lines = []
    for name, shape in MODELS.items():
        size_words = f"{total_parameters(shape):,} parameters"
        lines += [f"## {name}: {size_words}, {flops(shape) / 1e9:.1f} GFLOP a token", ""]
        columns = [f"GiB on {size:,}" for size in SIZES]
        columns += [f"sends longer above, {network}" for network in NETWORKS]
        lines += [f"| `ACCEL=` | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
        for strategy in STRATEGIES:
            held = [memory(strategy, shape, size) / 2**30 for size in SIZES]
            cells = [f"{gib:,.{int(gib < 9.95)}f}" for gib in held]
            for network in NETWORKS.values():
                most = largest(strategy, shape, network)
                cells.append("never" if most == SIZES[-1] else f"{most} GPUs")
            lines.append(f"| `{strategy}` | {' | '.join(cells)} |")
        lines += ["", "| GPUs | computes, s |" + "".join(f" `{s}` sends, s |" for s in STRATEGIES)]
        lines.append("|---|---|" + "---|" * len(STRATEGIES))
        for size in SIZES[1:]:
            times = [step(s, shape, size, NETWORKS["400 Gbit/s"]) for s in STRATEGIES]
            cells = [f"{times[0][0]:.2f}", *(f"{sends:.2f}" for _, sends in times)]
            lines.append(f"| {size:,} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
