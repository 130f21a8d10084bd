"""One trial of gpu.py, in a separate process: train for some steps, and report the speed.

    python -m benchmarks.trial SPEC.json RESULT.json

Both sides train the same shape from random weights, on the same sequences in the same order, with
AdamW; the clock, the count of tokens and the statistics are the same code for both.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import record
from train.engine import guard, metrics, models, strategy
from train.engine.batches import Blocks, block_at, micro_batch_positions
from train.engine.config import TextConfig
from train.engine.distributed import agree, init_distributed, rank, world_size
from train.engine.errors import run_to_exit
from train.engine.loss import TokenLoss, global_target_tokens
from train.engine.presets import PRESETS
from train.engine.schedule import lr_at
from train.engine.settings import ModelSettings, OptimizerSettings, ScheduleSettings

# Kept free before the deadline, to write the result and exit.
RESERVE_S = 8.0
# Fewer timed steps than this are not a measurement.
LEAST_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The settings of a trial."""

    implementation: Literal["engine", "trainer"]
    compile: Literal["eager", "layers", "model"]
    attention: Literal["default", "flash", "cudnn"]
    micro_batch_size: int
    device: Literal["cuda", "cpu"]
    preset: str
    sequence_length: int
    global_batch_size: int
    warmup_steps: int
    steps: int
    lr: float
    seed: int
    profile: bool
    memory_limit_gib: float | None
    data: str
    tokenizer: str
    scratch: str
    deadline: float
    """By time.time(): the process is killed then."""

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro batches in an optimizer step."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def all_steps(self) -> int:
        """Warm-up, timed steps, and one under the profiler."""
        return self.warmup_steps + self.steps + self.profile


def main(argv: list[str]) -> int:
    """Run the trial of the file `argv[0]`; write its result to `argv[1]`."""
    spec = Spec(**json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    watch = Watch(spec, Path(argv[1]))
    try:
        device = init_distributed() if spec.implementation == "engine" else _device(spec)
        blocks = Blocks(Path(spec.data), spec.sequence_length)
        watch.prepare(device)
        train = _train_engine if spec.implementation == "engine" else _train_with_trainer
        train(spec, device, blocks, watch)
    except Exception as error:
        traceback.print_exc()
        watch.fail(error)
    return 0


def _device(spec: Spec) -> torch.device:
    return torch.device("cuda", 0) if spec.device == "cuda" else torch.device("cpu")


# ---- the two sides ----


def _train_engine(spec: Spec, device: torch.device, blocks: Blocks, watch: Watch) -> None:
    """Train as train/tinyllama.py does, without its evaluation, checkpoints and log."""
    optimizer, schedule = OptimizerSettings(lr=spec.lr), ScheduleSettings(warmup_steps=2)
    config = TextConfig(model=ModelSettings(preset=spec.preset))
    model = models.build(config, Path(spec.tokenizer), spec.seed)
    watch.describe(model)
    loss_module = TokenLoss(model, device, bf16=True)
    if spec.compile == "layers":
        loss_module.compile_parts()
    elif spec.compile == "model":
        loss_module.compile(dynamic=False)
    wrapped = strategy.prepare(
        loss_module,
        optimizer,
        name="ddp",
        device=device,
        micro_batch_size=spec.micro_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        resume=None,
    )
    timer = metrics.StepTimer(spec.warmup_steps)
    with _kernels(spec, model):
        for step in range(spec.all_steps):
            watch.step_begins()
            started = time.perf_counter()
            torch.manual_seed((spec.seed * 1_000_003 + step) * 65_537 + rank())
            positions = micro_batch_positions(
                step * spec.global_batch_size,
                rank=rank(),
                world_size=world_size(),
                micro_batch_size=spec.micro_batch_size,
                gradient_accumulation_steps=spec.gradient_accumulation_steps,
            )
            batch = []
            for micro in positions:
                indices = [block_at(p, num_blocks=blocks.num_full, seed=spec.seed) for p in micro]
                rows = blocks.rows(indices)
                batch.append([torch.from_numpy(part).to(device) for part in rows])
            data_seconds = time.perf_counter() - started
            tokens = global_target_tokens((labels for _, labels in batch), device)
            scale = (world_size() / tokens).float()
            local_loss = torch.zeros((), dtype=torch.float64, device=device)
            for number, (inputs, labels) in enumerate(batch, start=1):
                last = number == spec.gradient_accumulation_steps
                local_loss += wrapped.accumulate((inputs, labels), scale=scale, last=last)
            mine = float(local_loss) / world_size()
            loss, _, _ = agree(mine, False, False, device=device)
            guard.check_loss(mine, loss, step=step, positions=positions)
            lr = lr_at(step, peak_lr=spec.lr, max_steps=spec.all_steps, schedule=schedule)
            wrapped.set_lr(lr)
            grad_norm = wrapped.step()
            guard.check_gradient(grad_norm, step=step, positions=positions)
            if step < spec.warmup_steps + spec.steps:
                timer.add(
                    tokens=float(tokens),
                    seconds=time.perf_counter() - started,
                    data_seconds=data_seconds,
                )
            watch.loss(torch.tensor(loss))
            if not watch.step_ends():
                break
    watch.finish({"data_wait": timer.take().get("data_wait"), "step_timer": timer.summary()})


def _train_with_trainer(spec: Spec, device: torch.device, blocks: Blocks, watch: Watch) -> None:
    """Train with the Hugging Face Trainer at the settings that make it fastest."""
    from torch.utils.data import Dataset
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Rows(Dataset):  # type: ignore[type-arg]
        """The engine's sequences in the engine's order."""

        def __len__(self) -> int:
            return spec.all_steps * spec.global_batch_size

        def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
            index = block_at(position, num_blocks=blocks.num_full, seed=spec.seed)
            inputs = torch.from_numpy(blocks.rows([index])[0][0])
            return {"input_ids": inputs, "labels": inputs}

    class Marks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.step_begins()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.loss(trainer.step_loss)
            trainer.step_loss = torch.zeros((), device=device)
            if not watch.step_ends():
                control.should_training_stop = True

    class WithLosses(Trainer):
        """The Trainer, whose losses stay on the device until the end."""

        step_loss = torch.zeros((), device=device)

        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*arguments, **options)
            self.step_loss = self.step_loss + loss.detach()
            return loss

    torch.manual_seed(spec.seed)
    with device:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**vars(PRESETS[spec.preset])), dtype=torch.float32
        )
    model.config.use_cache = False
    watch.describe(model)
    settings = OptimizerSettings(lr=spec.lr)
    arguments = TrainingArguments(
        output_dir=spec.scratch,
        use_cpu=spec.device == "cpu",
        bf16=True,
        optim="adamw_torch_fused",
        torch_compile=spec.compile == "model",
        per_device_train_batch_size=spec.micro_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        max_steps=spec.all_steps,
        learning_rate=settings.lr,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        seed=spec.seed,
        train_sampling_strategy="sequential",
        # These would make it wait for the device in each step, or write.
        logging_nan_inf_filter=False,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = WithLosses(model=model, args=arguments, train_dataset=Rows(), callbacks=[Marks()])
    trainer.train()
    watch.finish({})


@contextlib.contextmanager
def _kernels(spec: Spec, model: Any) -> Iterator[None]:
    """Force one attention kernel, without a mask; `default` leaves the engine's choice."""
    if spec.attention == "default":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # transformers makes no mask for an unknown attention: sdpa is causal by itself.
    AttentionInterface.register("without_mask", sdpa_attention_forward)
    model.set_attn_implementation("without_mask")
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    with sdpa_kernel([backends[spec.attention]]):
        yield


# ---- the clock ----


class Watch:
    """Times steps the same way for both sides, and writes the result.

    On a GPU the ends of steps are events in its queue, so that reading the clock does not wait; a
    step is the time between two ends, including the loading of data.
    """

    def __init__(self, spec: Spec, path: Path) -> None:
        self._spec = spec
        self._path = path
        self._device = _device(spec)
        self._ends: list[Any] = []
        self._losses: list[torch.Tensor] = []
        self._step = 0
        self._began: float | None = None
        self._first_step_s: float | None = None
        self._profiler: Any = None
        self._result: dict[str, Any] = {}
        self._gpu: dict[str, str] = {}

    def prepare(self, device: torch.device) -> None:
        """Record the device of the trial, and apply a memory limit."""
        assert device == self._device, (device, self._device)
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            cudnn = torch.backends.cudnn.version()
            self._result["device"] = {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "cuda": torch.version.cuda,
                "cudnn": cudnn,
                "peak_flops": metrics.peak_flops(properties.name),
            }
            if self._spec.memory_limit_gib is not None:
                part = self._spec.memory_limit_gib * 2**30 / properties.total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, part), device)
        else:
            self._result["device"] = {"name": "CPU", "peak_flops": None}

    def describe(self, model: Any) -> None:
        """Record the size of the model."""
        self._result["parameters"] = sum(p.numel() for p in model.parameters())
        self._result["flops_per_token"] = models.flops_per_token(model, self._spec.sequence_length)

    def step_begins(self) -> None:
        """Called before each step."""
        if self._began is None:
            self._began = time.perf_counter()
            # Only now: libraries that are loaded late would count toward the limit.
            if self._device.type == "cpu" and self._spec.memory_limit_gib is not None:
                _limit_address_space(self._spec.memory_limit_gib)
        if self._step == self._spec.warmup_steps + self._spec.steps:
            self._profiler = _start_profiler()

    def loss(self, loss: torch.Tensor) -> None:
        """Keep a step's mean loss, on its device."""
        self._losses.append(loss)

    def step_ends(self) -> bool:
        """Called after each step; return whether to do another."""
        spec = self._spec
        self._step += 1
        timed = self._step - spec.warmup_steps
        if self._step == 1:
            self._synchronize()
            assert self._began is not None
            self._first_step_s = time.perf_counter() - self._began
        if 0 <= timed <= spec.steps:
            self._ends.append(self._mark())
        if timed == 0 and self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            threading.Thread(target=self._look_at_gpu, daemon=True).start()
        if self._profiler is not None:
            return False
        late = time.time() > spec.deadline - RESERVE_S
        if timed < LEAST_STEPS or (timed < spec.steps and not late):
            return True
        # Write the measurements first: a profiler may crash the process.
        self._measure()
        self._write()
        return spec.profile and not late

    def finish(self, more: dict[str, Any]) -> None:
        """Write the whole result, with `more` that only one side has."""
        self._result |= more
        if self._profiler is not None:
            self._result["kernels"] = _stop_profiler(self._profiler)
        self._write()

    def fail(self, error: Exception) -> None:
        """Write that the trial failed, or that only its profile did."""
        if self._result.get("status") == "measured":
            self._result["note"] = f"after the timed steps: {type(error).__name__}"
        elif guard.is_out_of_memory(error):
            self._result |= {"status": "out_of_memory", "reason": None}
        else:
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {record.without_paths(lines[0])}"[:300]
            self._result |= {"status": "failed", "reason": reason}
        self._write()

    def _measure(self) -> None:
        spec = self._spec
        seconds = self._seconds()
        tokens = spec.global_batch_size * spec.sequence_length
        timer = metrics.StepTimer(warmup_steps=0)
        for one in seconds:
            timer.add(tokens=tokens, seconds=one, data_seconds=0.0)
        rates = timer.summary()
        peak = self._result["device"]["peak_flops"]
        losses = [float(loss) for loss in self._losses]
        self._result |= {
            "status": "measured",
            "reason": None,
            "steps_timed": len(seconds),
            "warmup_steps_excluded": spec.warmup_steps,
            "first_step_seconds": round(self._first_step_s or 0.0, 2),
            **rates,
            "tokens_per_second_mean": tokens * len(seconds) / sum(seconds),
            "mfu": rates["tokens_per_second_median"] * self._result["flops_per_token"] / peak
            if peak
            else None,
            **self._memory(),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "gpu": self._gpu or None,
        }

    def _mark(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self) -> list[float]:
        self._synchronize()
        pairs = zip(self._ends, self._ends[1:], strict=False)
        if self._device.type == "cpu":
            return [end - start for start, end in pairs]
        return [start.elapsed_time(end) / 1000 for start, end in pairs]

    def _memory(self) -> dict[str, float | None]:
        if self._device.type == "cpu":
            peak = metrics.memory(self._device)["peak_memory_gib"]
            return {"peak_memory_allocated_gib": peak, "peak_memory_reserved_gib": None}
        return {
            "peak_memory_allocated_gib": torch.cuda.max_memory_allocated(self._device) / 2**30,
            "peak_memory_reserved_gib": torch.cuda.max_memory_reserved(self._device) / 2**30,
        }

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _look_at_gpu(self) -> None:
        """Record clock and power during the timed steps: a power cap slows the clock."""
        time.sleep(2)
        seen = record.nvidia_smi("clocks.sm", "power.draw", "temperature.gpu")
        if seen:
            self._gpu |= dict(
                zip(("sm_clock_mhz", "power_w", "temperature_c"), seen.values(), strict=True)
            )

    def _write(self) -> None:
        record.write(self._path, self._result)


def _limit_address_space(gib: float) -> None:
    """Limit this process to `gib` more than it has now; a stand-in for a device's memory."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _start_profiler() -> Any:
    try:
        from torch.profiler import ProfilerActivity, profile

        profiler = profile(activities=[ProfilerActivity.CUDA])
        profiler.__enter__()
        return profiler
    except Exception:
        traceback.print_exc()
        return False


def _stop_profiler(profiler: Any) -> dict[str, Any] | None:
    """Return the kernels that took the most time in the step, in ms, and the share of each."""
    if not profiler:
        return None
    try:
        torch.cuda.synchronize()
        profiler.__exit__(None, None, None)
        found: dict[str, list[float]] = {}
        for event in profiler.events():
            # Annotations overlap the kernels and would count their time twice.
            if "CUDA" in str(event.device_type) and not getattr(event, "is_user_annotation", False):
                entry = found.setdefault(event.name[:100], [0.0, 0])
                entry[0] += event.time_range.elapsed_us() / 1000
                entry[1] += 1
        total = sum(ms for ms, _ in found.values())
        largest = sorted(found.items(), key=lambda item: -item[1][0])[:20]
        return {
            "total_ms": round(total, 2),
            "largest": [
                {"name": name, "ms": round(ms, 2), "calls": calls, "share": round(ms / total, 4)}
                for name, (ms, calls) in largest
            ],
        }
    except Exception:
        traceback.print_exc()
        return None


if __name__ == "__main__":
    run_to_exit(main)
