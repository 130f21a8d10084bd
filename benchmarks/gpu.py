"""The engine's speed compared with the Hugging Face Trainer's: same model, batches and optimizer.

    python benchmarks/gpu.py                                  # one GPU, under ten minutes
    python benchmarks/gpu.py --device cpu --preset tiny --sequence_length 64 \\
        --micro_batch_sizes 4 --global_batch_size 8 --compile eager

Needs torch, transformers, accelerate and jsonargparse, and no network. Each trial is a separate
process (trial.py). The record is written after each, so that a kill loses only one trial.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

if __package__ in (None, ""):  # started as a file: the checkout is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import record
from runfolder.errors import UserError
from train.engine import arguments, batches
from train.engine.errors import run_to_exit
from train.engine.presets import PRESETS

CONVENTION = (
    "model FLOPs utilisation: tokens/s x (6 N + 12 L d T) / peak; N the parameters that multiply "
    "(no embedding look-ups), L layers, d hidden size, T sequence length, attention counted as if "
    "not causal (PaLM, arXiv:2204.02311, appendix B); peak: dense bf16 of the data sheet"
)
AIM_MFU = 0.50
TRAINER = (
    "transformers.Trainer: bf16=True, fused AdamW, no logging, no NaN filter, no checkpoint; "
    "weights in fp32, autocast; its model is built by AutoModelForCausalLM.from_config as it comes"
)
# Kept free at the end of the budget, to kill the last trial and to write the record.
RESERVE_S = 6.0

CHOICES = {"compile": ("eager", "layers", "model"), "attention": ("default", "cudnn", "flash")}


@dataclass(kw_only=True)
class Config:
    """Measure the engine and the Hugging Face Trainer on this machine's accelerator."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cpu shows that the benchmark works; its figures say little about a GPU."""
    preset: str = "tinyllama-1.1b"
    """The model's shape, with random weights: tiny, 15m, 110m or tinyllama-1.1b."""
    sequence_length: int = 2048
    """Tokens in a sequence."""
    global_batch_size: int = 32
    """Sequences in an optimizer step, the same in all trials."""
    micro_batch_sizes: str = "4,8,16,32"
    """Sequences in one forward pass, to try; the rest of a step is accumulation."""
    compile: str = "eager,layers,model"
    """eager: no torch.compile. layers: a layer and the loss (`compile: true`), only for the
    engine. model: compiled as a whole, as the Trainer does; for the engine a candidate."""
    attention: str = "default,cudnn,flash"
    """Kernels to try for the engine's attention, once each; default: the engine's own choice."""
    steps: int = 12
    """Timed optimizer steps in a trial."""
    warmup_steps: int = 3
    """Steps before them that do not count."""
    lr: float = 3e-4
    """Peak learning rate."""
    seed: int = 42
    budget_s: int = 540
    """Time for everything; trials that do not fit are skipped."""
    trial_limit_s: int = 180
    """Time limit of one trial; then it is killed."""
    memory_limit_gib: float | None = None
    """Treat the device as if it had no more memory than this."""
    profile: bool = True
    """Add one step under the profiler to each trial on a GPU, and record the largest kernels."""
    results: str = "benchmarks/results"
    """The folder for the record."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"preset: '{self.preset}' is not one of {', '.join(PRESETS)}")
        longest = PRESETS[self.preset].max_position_embeddings
        if not 2 <= self.sequence_length <= longest:
            raise UserError(f"sequence_length: {self.sequence_length} is not from 2 to {longest}")
        for setting in ("global_batch_size", "warmup_steps", "budget_s", "trial_limit_s"):
            if getattr(self, setting) < 1:
                raise UserError(f"{setting}: {getattr(self, setting)} is not positive")
        if self.steps < 3:
            raise UserError(f"steps: {self.steps} is less than 3, too few for a median")
        for setting, choices in CHOICES.items():
            for word in _words(getattr(self, setting)):
                if word not in choices:
                    raise UserError(f"{setting}: '{word}' is not one of {', '.join(choices)}")
        for word in _words(self.micro_batch_sizes):
            if not word.isdecimal() or int(word) < 1 or self.global_batch_size % int(word):
                raise UserError(
                    f"micro_batch_sizes: '{word}' does not divide global_batch_size "
                    f"{self.global_batch_size}"
                )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The settings that differ between trials."""

    implementation: Literal["engine", "trainer"]
    compile: str
    micro_batch_size: int
    attention: str = "default"

    def __str__(self) -> str:
        kernel = "" if self.attention == "default" else f", {self.attention} attention"
        return f"{self.implementation}, {self.compile}{kernel}, micro batch {self.micro_batch_size}"


def main(argv: list[str], now: Callable[[], float] = time.monotonic) -> int:
    """Run the benchmark; return its exit code. The budget is of the seconds of `now`."""
    started = now()
    config = arguments.parse(Config, argv, prog="benchmarks/gpu.py", dry_run={})
    found: dict[str, Any] = {
        "benchmark": "speed of training, engine and Hugging Face Trainer",
        "circumstances": record.circumstances()
        | {
            "gpu": record.nvidia_smi("name", "driver_version", "power.limit", "memory.total")
            if config.device == "cuda"
            else None
        },
        "workload": _workload(config),
        "convention": CONVENTION,
        "trainer": TRAINER,
        "trials": [],
    }
    trials = plan(config)
    print(f"{len(trials)} trials planned, {config.budget_s} s at most", flush=True)
    path = None
    with tempfile.TemporaryDirectory(prefix="sluice-benchmark-") as scratch, _ends_on_signals():
        data, tokenizer = Path(scratch) / "data", Path(scratch) / "tokenizer"
        write_tokens(config, data)
        write_tokenizer(tokenizer)
        try:
            for number, trial in enumerate(trials, start=1):
                left = config.budget_s - RESERVE_S - (now() - started)
                reason = reason_to_skip(trial, found["trials"], left)
                if reason:
                    outcome: dict[str, Any] = {"status": "skipped", "reason": reason}
                else:
                    limit = min(left, config.trial_limit_s)
                    outcome = run_trial(config, trial, Path(scratch), data, tokenizer, limit)
                found["trials"].append(asdict(trial) | outcome)
                print(f"{number:>3} of {len(trials)}: {trial}: {_in_words(outcome)}", flush=True)
                path = _save(config, found, now() - started)
        except KeyboardInterrupt:
            print("stopped; the measurements so far are recorded", flush=True)
    path = _save(config, found, now() - started)
    print("\n" + table(found) + f"\n\nrecord: {os.path.relpath(path)}", flush=True)
    return 0 if any(one["status"] == "measured" for one in found["trials"]) else 1


# ---- the trials ----


def plan(config: Config) -> list[Trial]:
    """Return the trials, the most important first: there may not be enough time for all.

    First the second largest size, in every way; then the others, compiled before eager.
    """
    sizes = sorted({int(word) for word in _words(config.micro_batch_sizes)})
    compile_modes, kernels = _words(config.compile), _words(config.attention)
    first = sizes[-2] if len(sizes) > 1 else sizes[0]
    others = [size for size in reversed(sizes) if size != first]
    trials = []
    for size in (first, *others):
        modes = compile_modes if size == first else sorted(compile_modes, key=_eager_last)
        for mode in modes:
            trials.append(Trial(implementation="engine", compile=mode, micro_batch_size=size))
            if mode != "layers":
                trials.append(Trial(implementation="trainer", compile=mode, micro_batch_size=size))
        if size == first and config.device == "cuda":
            # The compile mode that starts fastest is enough to compare kernels.
            mode = next((mode for mode in ("layers", "model") if mode in modes), modes[0])
            trials += [
                Trial(implementation="engine", compile=mode, micro_batch_size=size, attention=kind)
                for kind in kernels
                if kind != "default"
            ]
    return trials


def _eager_last(mode: str) -> bool:
    return mode == "eager"


def reason_to_skip(trial: Trial, done: list[dict[str, Any]], left_s: float) -> str | None:
    """Return why a trial is skipped, or None."""
    for one in done:
        keys = ("implementation", "compile", "attention")
        same = all(one[key] == getattr(trial, key) for key in keys)
        smaller = one["micro_batch_size"] <= trial.micro_batch_size
        if same and smaller and one["status"] == "out_of_memory":
            return f"micro batch {one['micro_batch_size']} already ran out of memory"
    alike = [
        one["seconds"]
        for one in done
        if one["compile"] == trial.compile and one["status"] in ("measured", "timed_out")
    ]
    needed = max(alike, default=5.0)
    return f"out of time: {needed:.0f} s needed, {left_s:.0f} s left" if needed > left_s else None


# ---- the data: random token ids ----


def write_tokens(config: Config, folder: Path) -> None:
    """Write packed text for all steps of a trial: random ids, small ones more often.

    With uniform ids there would be nothing to learn, and no falling loss to check.
    """
    folder.mkdir(parents=True)
    vocab_size = PRESETS[config.preset].vocab_size
    sequences = (config.warmup_steps + config.steps + 1) * config.global_batch_size
    num_tokens = sequences * config.sequence_length + 1
    random = np.random.default_rng(config.seed).random(num_tokens)
    tokens = (random**3 * vocab_size).astype(np.uint16)
    tokens.tofile(folder / "tokens.bin")
    packed = batches.PackedText(
        format=batches.FORMAT,
        dtype="uint16",
        num_tokens=num_tokens,
        num_documents=1,
        num_bytes=num_tokens,
        vocab_size=vocab_size,
    )
    (folder / "meta.json").write_text(json.dumps(asdict(packed)), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """Write an empty tokenizer: building a model needs one, but the model keeps its own size."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True)
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")


# ---- one trial ----


def run_trial(
    config: Config, trial: Trial, scratch: Path, data: Path, tokenizer: Path, limit_s: float
) -> dict[str, Any]:
    """Run a trial in a separate process, for `limit_s` at most; return its outcome."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        result_path, log = Path(folder) / "result.json", Path(folder) / "log"
        spec = asdict(trial) | {
            "device": config.device,
            "preset": config.preset,
            "sequence_length": config.sequence_length,
            "global_batch_size": config.global_batch_size,
            "warmup_steps": config.warmup_steps,
            "steps": config.steps,
            "lr": config.lr,
            "seed": config.seed,
            "profile": config.profile and config.device == "cuda",
            "memory_limit_gib": config.memory_limit_gib,
            "data": str(data),
            "tokenizer": str(tokenizer),
            "scratch": folder,
            "deadline": time.time() + limit_s,
        }
        spec_path = Path(folder) / "spec.json"
        spec_path.write_text(json.dumps(spec), encoding="utf-8")
        started = time.monotonic()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.trial", str(spec_path), str(result_path)],
                cwd=record.ROOT,
                env=_environment(config, folder),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            in_time = True
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                in_time = False
            finally:
                _end(process)
        seconds = round(time.monotonic() - started, 1)
        outcome: dict[str, Any] = {"status": None}
        with contextlib.suppress(OSError, ValueError):
            outcome |= json.loads(result_path.read_text(encoding="utf-8"))
        if outcome["status"] is None:
            outcome |= _without_result(process.returncode, in_time, limit_s, log)
        if outcome["status"] in ("failed", "killed"):
            text = log.read_text(encoding="utf-8", errors="replace")
            print("\n".join(text.splitlines()[-25:]), file=sys.stderr, flush=True)
        return outcome | {"seconds": seconds}


def _without_result(code: int, in_time: bool, limit_s: float, log: Path) -> dict[str, Any]:
    """Return the outcome of a trial that could not write its own."""
    if not in_time:
        return {"status": "timed_out", "reason": f"no result within {limit_s:.0f} s"}
    if code == -signal.SIGKILL:
        return {"status": "killed", "reason": "by the system, perhaps because of low memory"}
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    if re.search("(?i)out of memory|cannot allocate|can't allocate", " ".join(lines[-5:])):
        return {"status": "out_of_memory", "reason": None}
    return {"status": "failed", "reason": f"exit {code}: {record.without_paths(lines[-1])}"[:300]}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a trial and what it started: it leads its own process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(config: Config, scratch: str) -> dict[str, str]:
    """Return the environment of a trial: one process, one device, its own caches."""
    launchers = ("ACCELERATE_", "SLUICE_", "FSDP_", "PET_", "TORCHELASTIC_", "SLURM_")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    ours = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(launchers) and key not in ranks
    }
    ours |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "TRITON_CACHE_DIR": f"{scratch}/triton",
    }
    if config.device == "cpu":
        return ours | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    # With several GPUs, the Trainer would split its batches over them.
    return ours | {"CUDA_VISIBLE_DEVICES": ours.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


@contextlib.contextmanager
def _ends_on_signals() -> Iterator[None]:
    """Let TERM end the benchmark as Ctrl+C does: kill the trial, write the record."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- the output ----


def ratios(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return engine : Trainer, by median tokens/s: same settings, then best with best."""
    measured = [one for one in trials if one["status"] == "measured"]
    key = "tokens_per_second_median"

    def ratio(kind: str, engine: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
        keys = ("compile", "attention", "micro_batch_size", key)
        return {
            "kind": kind,
            "engine": {name: engine[name] for name in keys},
            "trainer": {name: trainer[name] for name in keys},
            "ratio": engine[key] / trainer[key],
        }

    sides = {
        side: [one for one in measured if one["implementation"] == side]
        for side in ("engine", "trainer")
    }
    found = [
        ratio("same settings", engine, trainer)
        for engine in sides["engine"]
        for trainer in sides["trainer"]
        if engine["attention"] == "default"
        and engine["compile"] == trainer["compile"]
        and engine["micro_batch_size"] == trainer["micro_batch_size"]
    ]
    if sides["trainer"] and sides["engine"]:
        best_of = {side: max(some, key=lambda one: one[key]) for side, some in sides.items()}
        shipped = [one for one in sides["engine"] if not _is_candidate(one)]
        if shipped:
            best = max(shipped, key=lambda one: one[key])
            found.append(ratio("best of each", best, best_of["trainer"]))
        if _is_candidate(best_of["engine"]):
            found.append(ratio("best, candidates too", best_of["engine"], best_of["trainer"]))
    return found


def _is_candidate(trial: dict[str, Any]) -> bool:
    """Return whether a trial uses something that the engine's own settings do not offer."""
    return (trial["compile"], trial["attention"]) not in (
        ("eager", "default"),
        ("layers", "default"),
    )


def table(found: dict[str, Any]) -> str:
    """Return the record as text for a terminal."""
    header = ["compile", "attention", "micro", "tokens/s", "p10", "p90", "MFU", "GiB", "reserved"]
    rows = [["", *header, "first step"]]
    for one in found["trials"]:
        name = one["implementation"] + ("*" if _is_candidate(one) else "")
        head = [name, one["compile"], one["attention"], str(one["micro_batch_size"])]
        rows.append(head + (_figures(one) if one["status"] == "measured" else [_in_words(one)]))
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in (rows if i < 4 else full)) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=False)]
        # Trials that were not measured have words instead of figures.
        lines.append("  ".join(cells if len(row) == len(widths) else [*cells[:4], row[4]]))
    lines.append("")
    for one in found.get("ratios", []):
        engine, trainer = one["engine"], one["trainer"]
        lines.append(
            f"engine : Trainer = {one['ratio']:.2f}  ({one['kind']}: {_settings(engine)} against "
            f"{_settings(trainer)})"
        )
    lines += ["", f"MFU: {found['convention']}."]
    if any(_is_candidate(one) for one in found["trials"]):
        lines.append("* a candidate: not available with the engine's own settings.")
    best = [one["mfu"] for one in found["trials"] if one.get("mfu")]
    if best:
        lines.append(f"Best MFU {max(best):.1%}; the aim is {AIM_MFU:.0%}.")
    return "\n".join(lines)


def _figures(one: dict[str, Any]) -> list[str]:
    reserved = one["peak_memory_reserved_gib"]
    return [
        f"{one['tokens_per_second_median']:,.0f}",
        f"{one['tokens_per_second_p10']:,.0f}",
        f"{one['tokens_per_second_p90']:,.0f}",
        f"{one['mfu']:.1%}" if one["mfu"] else "n/a",
        f"{one['peak_memory_allocated_gib']:.1f}",
        f"{reserved:.1f}" if reserved else "n/a",
        f"{one['first_step_seconds']:.1f} s",
    ]


def _settings(one: dict[str, Any]) -> str:
    kernel = "" if one["attention"] == "default" else f" {one['attention']}"
    return f"{one['compile']}{kernel} {one['micro_batch_size']}"


def _in_words(outcome: dict[str, Any]) -> str:
    if outcome["status"] == "measured":
        mfu = f", MFU {outcome['mfu']:.1%}" if outcome["mfu"] else ""
        return f"{outcome['tokens_per_second_median']:,.0f} tokens/s{mfu}"
    reason = f": {outcome['reason']}" if outcome.get("reason") else ""
    return f"{outcome['status']}{reason}".replace("_", " ", 1)


def _workload(config: Config) -> dict[str, Any]:
    names = ("device", "preset", "sequence_length", "global_batch_size", "warmup_steps", "steps")
    more = ("lr", "seed", "budget_s", "trial_limit_s", "memory_limit_gib")
    return {name: getattr(config, name) for name in names + more} | {
        "precision": "bf16 autocast over fp32 weights, gradients and AdamW states",
        "text": "random token ids, seeded",
    }


def _save(config: Config, found: dict[str, Any], seconds: float) -> Path:
    devices = [one["device"] for one in found["trials"] if "device" in one]
    found["device"] = devices[0] if devices else None
    found["ratios"] = ratios(found["trials"])
    found["seconds"] = round(seconds, 1)
    name = devices[0]["name"] if devices else config.device
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return record.save(Path(config.results), f"speed-{slug}", found)


if __name__ == "__main__":
    run_to_exit(main)
