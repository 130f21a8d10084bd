"""What a larger corpus costs: the memory to pack it, and the time to resume far into it.

    python benchmarks/corpus.py

Packs a corpus and one twenty times larger with the command behind `make fetch`, and compares the
peak memory. Then opens packed text of a million blocks at its beginning and far into it, beside a
DataLoader whose first batches are skipped, which is how most training scripts resume.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the checkout is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import record
from runfolder.errors import UserError
from train.engine import arguments, batches
from train.engine.errors import RunFailed, run_to_exit

AIM_MEMORY_RATIO = 1.1
AIM_RESUME_RATIO = 1.1
FORMATS = ("txt", "jsonl")
PEER = "torch DataLoader and accelerate.skip_first_batches"


@dataclass(kw_only=True)
class Config:
    """Measure what a larger corpus costs."""

    size_mb: float = 2.0
    """Size of the smaller corpus, in millions of bytes."""
    factor: int = 20
    """How many times larger the other corpus is."""
    formats: str = "txt,jsonl"
    """One document in all, or many."""
    sequence_length: int = 2048
    """Tokens in a block."""
    batch_size: int = 8
    """Blocks in a batch."""
    near_block: int = 10
    far_block: int = 1_000_000
    """Position in the reading order at which the engine resumes."""
    skip_batches: int = 10_000
    """Batches that the DataLoader skips; compared with 10 batches."""
    repeats: int = 5
    """How often each resumption is measured, the engine's 20 times as often, as it is so short;
    the median counts."""
    seed: int = 42
    results: str = "benchmarks/results"
    """The folder for the record."""

    def __post_init__(self) -> None:
        for setting in ("size_mb", "factor", "sequence_length", "batch_size", "repeats"):
            if getattr(self, setting) <= 0:
                raise UserError(f"{setting}: {getattr(self, setting)} is not positive")
        for word in self.formats.split(","):
            if word not in FORMATS:
                raise UserError(f"formats: '{word}' is not one of {', '.join(FORMATS)}")
        if not 0 <= self.near_block < self.far_block:
            raise UserError(f"far_block: {self.far_block} is not above near_block")
        if self.skip_batches <= 10:
            raise UserError(f"skip_batches: {self.skip_batches} is not above 10")


def main(argv: list[str]) -> int:
    """Run the benchmark; return its exit code."""
    started = time.monotonic()
    config = arguments.parse(Config, argv, prog="benchmarks/corpus.py", dry_run={})
    with tempfile.TemporaryDirectory(prefix="sluice-benchmark-") as folder:
        scratch = Path(folder)
        memory = measure_packing(config, scratch)
        print(memory_table(memory) + "\n", flush=True)
        resumption = measure_resumption(config, scratch / "blocks")
        print(resumption_table(resumption), flush=True)
    found = {
        "benchmark": "cost of a larger corpus: memory to pack it, time to resume in it",
        "circumstances": record.circumstances(),
        "workload": {name: value for name, value in vars(config).items() if name != "results"},
        "memory": memory,
        "resumption": resumption,
        "seconds": round(time.monotonic() - started, 1),
    }
    path = record.save(Path(config.results), "corpus", found)
    print(f"\nrecord: {os.path.relpath(path)}", flush=True)
    return 0


# ---- memory ----


def measure_packing(config: Config, scratch: Path) -> dict[str, Any]:
    """Return the peak memory of packing the corpora, by format, and the ratios."""
    words = vocabulary(config.seed)
    head = scratch / "head.txt"
    write_corpus(head, 1_000_000, words, config.seed)
    environment = _environment(scratch / "datasets")
    # First only what the others share, so that these only pack.
    _fetch(head, head, None, environment)
    tokenizer = next((scratch / "datasets" / "tokenizers").glob("*/tokenizer.json"))
    formats = {}
    for suffix in config.formats.split(","):
        runs = []
        for size_mb in (config.size_mb, config.size_mb * config.factor):
            corpus = scratch / f"corpus.{suffix}"
            num_bytes = write_corpus(corpus, int(size_mb * 1e6), words, config.seed)
            report = _fetch(corpus, head, tokenizer, environment)
            corpus.unlink()
            runs.append(
                {
                    "corpus_bytes": num_bytes,
                    "peak_memory_mib": round(report["peak_bytes"] / 2**20, 1),
                    "seconds": report["seconds"],
                }
            )
        formats[suffix] = compare_memory(*runs) | {"runs": runs}
    return {"aim_ratio": AIM_MEMORY_RATIO, "formats": formats}


def compare_memory(small: dict[str, Any], large: dict[str, Any]) -> dict[str, float]:
    """Return the ratio of two peaks, and the bytes of memory for each further byte of corpus.

    The second does not depend on the memory of Python and its libraries without a corpus.
    """
    grown = (large["peak_memory_mib"] - small["peak_memory_mib"]) * 2**20
    return {
        "ratio": round(large["peak_memory_mib"] / small["peak_memory_mib"], 4),
        "bytes_for_each_byte": round(grown / (large["corpus_bytes"] - small["corpus_bytes"]), 4),
    }


def write_corpus(path: Path, num_bytes: int, words: list[str], seed: int) -> int:
    """Write about `num_bytes` of made-up text, as one document or (jsonl) as many; return how many.

    Frequent words are frequent as in a language (Zipf), so that the tokenizer works as usual.
    """
    draw = random.Random(seed)
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < num_bytes:
            chosen = draw.choices(words, weights, k=2000)
            lines = [" ".join(chosen[i : i + 12]) for i in range(0, len(chosen), 12)]
            text = "\n".join(lines) + "\n"
            if path.suffix == ".jsonl":
                text = json.dumps({"text": text}) + "\n"
            written += stream.write(text)  # characters, each of which is one byte here
    return written


def peak_memory(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command; return its peak memory in bytes and its seconds.

    Raises:
        RunFailed: it failed.
    """
    measure = [sys.executable, "-I", "-S", str(record.ROOT / "benchmarks" / "peak_memory.py")]
    done = subprocess.run(
        [*measure, *command],
        cwd=record.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    *_, last = done.stdout.splitlines() or [""]
    report: dict[str, Any] = json.loads(last) if done.returncode == 0 else {"exit_code": -1}
    if report["exit_code"] != 0:
        raise RunFailed(f"{' '.join(command[1:4])} failed: {done.stderr.strip()[-500:]}")
    return report


def _fetch(
    train: Path, validation: Path, tokenizer: Path | None, environment: dict[str, str]
) -> dict[str, Any]:
    command = [sys.executable, "-m", "train.resolve", "train.tinyllama", "--"]
    command += ["--model.preset", "15m", "--data.train", str(train)]
    command += ["--data.validation", str(validation)]
    if tokenizer:
        command += ["--model.tokenizer", str(tokenizer)]
    return peak_memory(command, environment)


def _environment(datasets: Path) -> dict[str, str]:
    ours = {key: value for key, value in os.environ.items() if not key.startswith("SLUICE_")}
    return ours | {"SLUICE_DATASETS": str(datasets), "HF_HUB_OFFLINE": "1"}


def vocabulary(seed: int) -> list[str]:
    """Return 20,000 words of one to four made-up syllables, short ones first as in a language."""
    draw = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < 20_000:
        count = min(4, 1 + len(words) // 2000)
        word = "".join(draw.choice("bcdfghklmnprstvw") + draw.choice("aeiou") for _ in range(count))
        if count == 1 or draw.random() < 0.9:
            word += draw.choice(["", "n", "r", "s", "t"])
        words[word] = None
        if count == 1 and len(words) > 300:
            words[word + draw.choice("aeiou") + "x" + str(len(words) % 10)] = None
    return list(words)


# ---- resumption ----


def measure_resumption(config: Config, folder: Path) -> dict[str, Any]:
    """Return the seconds to a first batch, near and far, of the engine and of the peer."""
    num_blocks = max(config.far_block, config.skip_batches * config.batch_size) + 100_000
    write_empty_blocks(folder, num_blocks, config.sequence_length)
    far, near, many = config.far_block, config.near_block, config.skip_batches

    # Each measurement uses the next batch: some positions take longer to compute.
    def engine(position: int) -> Callable[[int], Any]:
        return lambda turn: _engine_batch(config, folder, position + turn * config.batch_size)

    def peer(kind: str, skip: int) -> Callable[[int], Any]:
        return lambda _: _peer_batch(config, folder, kind, skip)

    cases = {
        "engine": (engine(near), engine(far), f"block {near:,}", f"block {far:,}"),
        "shuffled dataset": (peer("map", 10), peer("map", many), "batch 10", f"batch {many:,}"),
        "stream": (peer("stream", 10), peer("stream", many), "batch 10", f"batch {many:,}"),
    }
    found = {}
    for name, (first, second, first_name, second_name) in cases.items():
        repeats = config.repeats * (20 if name == "engine" else 1)
        near_s, far_s = _medians(first, second, repeats)
        found[name] = {
            "near": first_name,
            "far": second_name,
            "near_seconds": near_s,
            "far_seconds": far_s,
            "repeats": repeats,
            "ratio": round(far_s / near_s, 3),
        }
    return {
        "aim_ratio": AIM_RESUME_RATIO,
        "peer": PEER,
        "num_blocks": num_blocks,
        "engine": found.pop("engine"),
        "peers": found,
    }


def write_empty_blocks(folder: Path, num_blocks: int, sequence_length: int) -> None:
    """Write packed text of `num_blocks` that takes no disk space: a sparse file."""
    folder.mkdir(parents=True)
    num_tokens = num_blocks * sequence_length + 1
    with (folder / "tokens.bin").open("wb") as stream:
        stream.truncate(num_tokens * 2)
    packed = batches.PackedText(
        format=batches.FORMAT,
        dtype="uint16",
        num_tokens=num_tokens,
        num_documents=1,
        num_bytes=num_tokens,
        vocab_size=32_000,
    )
    (folder / "meta.json").write_text(json.dumps(asdict(packed)), encoding="utf-8")


def _medians(
    first: Callable[[int], Any], second: Callable[[int], Any], repeats: int
) -> tuple[float, float]:
    """Return the median seconds of two actions, measured in turns so that noise affects both.

    Of two rounds, the second counts: by then, imports and files are in memory.
    """
    for _ in range(2):
        seconds: tuple[list[float], list[float]] = ([], [])
        for turn in range(repeats):
            for action, into in zip((first, second), seconds, strict=True):
                started = time.perf_counter()
                action(turn)
                into.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _engine_batch(config: Config, folder: Path, position: int) -> Any:
    blocks = batches.Blocks(folder, config.sequence_length)
    indices = [
        batches.block_at(position + row, num_blocks=blocks.num_full, seed=config.seed)
        for row in range(config.batch_size)
    ]
    return blocks.rows(indices)


def _peer_batch(config: Config, folder: Path, kind: str, skip: int) -> Any:
    """Return the first batch after `skip`, of a shuffled dataset or of a stream of rows."""
    import torch
    from accelerate import skip_first_batches
    from torch.utils.data import DataLoader, Dataset, IterableDataset

    blocks = batches.Blocks(folder, config.sequence_length)

    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return blocks.num_full

        def __getitem__(self, index: int) -> Any:
            return blocks.rows([index])[0][0]

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return (blocks.rows([index])[0][0] for index in range(blocks.num_full))

    if kind == "map":
        order = torch.Generator().manual_seed(config.seed)
        loader: Any = DataLoader(Rows(), config.batch_size, shuffle=True, generator=order)
    else:
        loader = DataLoader(Stream(), config.batch_size)
    return next(iter(skip_first_batches(loader, skip)))


# ---- the output ----


def memory_table(memory: dict[str, Any]) -> str:
    """Return the memory of packing as text for a terminal."""
    lines = ["packing      corpus     peak memory      time"]
    for suffix, one in memory["formats"].items():
        lines += [
            f"{suffix:<7}{run['corpus_bytes'] / 1e6:>9.1f} MB{run['peak_memory_mib']:>12.1f} MiB"
            f"{run['seconds']:>8.1f} s"
            for run in one["runs"]
        ]
        lines.append(
            f"       ratio {one['ratio']:.3f} (aim: at most {memory['aim_ratio']}), "
            f"{one['bytes_for_each_byte']:+.3f} bytes for each further byte of corpus"
        )
    return "\n".join(lines)


def resumption_table(resumption: dict[str, Any]) -> str:
    """Return the times to a first batch as text for a terminal."""
    lines = ["first batch at                near           far         ratio"]
    rows = {"engine": resumption["engine"]} | {
        f"DataLoader, {name}": one for name, one in resumption["peers"].items()
    }
    for name, one in rows.items():
        lines.append(
            f"{name:<29}{one['near_seconds'] * 1e3:>8.2f} ms{one['far_seconds'] * 1e3:>11.2f} ms"
            f"{one['ratio']:>11.2f}   ({one['near']}, {one['far']})"
        )
    lines.append(
        f"DataLoader: {resumption['peer']}; engine's aim: at most {resumption['aim_ratio']}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_to_exit(main)
