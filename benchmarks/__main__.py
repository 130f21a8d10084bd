"""All benchmarks that this machine can run: python -m benchmarks [--device=cpu|cuda] [SETTING ...].

With a GPU, gpu.py; without, corpus.py and then gpu.py at a size that a CPU can train. Settings
are gpu.py's.
"""

from __future__ import annotations

from benchmarks import corpus, gpu
from train.engine.errors import run_to_exit

# Small enough for two cores, large enough that the arithmetic dominates, not the loop.
ON_A_CPU = (
    "--device=cpu --preset=15m --sequence_length=256 --global_batch_size=8 --micro_batch_sizes=8 "
    "--compile=eager --steps=6 --warmup_steps=2 --budget_s=150"
)


def main(argv: list[str]) -> int:
    """Run the benchmarks; return the worst of their exit codes."""
    if "--device=cuda" in argv:
        return gpu.main(argv)
    return max(corpus.main([]), gpu.main([*ON_A_CPU.split(), *argv]))


if __name__ == "__main__":
    run_to_exit(main)
