"""Atomic checkpoints: written to a hidden folder, hashed, then published by rank 0.

A checkpoint is the same for every strategy and world size: the fp32 weight and AdamW moments of
each trainable parameter, in full shape, spread over one safetensors file per rank, and the buffers
that belong to the model's state. So a run can resume with another strategy or world size, and
`export` needs neither.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import ChainMap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from runfolder.checkpoints import folder_name, published
from runfolder.files import write_atomically, write_json
from runfolder.moments import reached
from train.engine.checkpoint_reader import BUFFER, FORMAT, GENERATION, find_damage
from train.engine.distributed import (
    barrier,
    from_main_process,
    gather_strings,
    is_main_process,
    rank,
    world_size,
)
from train.engine.durable import describe, fsync
from train.engine.errors import RunFailed
from train.engine.settings import CheckpointSettings
from train.engine.shard import save_file
from train.engine.story import say
from train.engine.strategy.base import STATES, Strategy


class Checkpoints:
    """The checkpoints of a run folder; its methods are collective, its properties are not."""

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self.folder = folder
        self.settings = settings
        self._pending: tuple[int, Path] | None = None
        self._writer: threading.Thread | None = None
        self._report: dict[str, Any] = {}
        prepare(folder)

    # ---- saving ----

    def save(self, step: int, strategy: Strategy, state: dict[str, Any]) -> None:
        """Copy the state of the run and start writing it as checkpoint `step`.

        All ranks take part. The checkpoint is published by `finish`; with `asynchronous` off, on
        return. `state` must hold everything else that the run needs, as JSON.

        Raises:
            RunFailed: it could not be written; earlier checkpoints are unchanged.
        """
        self.finish()
        unpublished = self.folder / f".{folder_name(step)}"
        if is_main_process():
            _or_fail(lambda: unpublished.mkdir(exist_ok=True), self.folder)
        barrier()
        owners = _owners(strategy)
        mine = {}
        for name, parameter in strategy.parameters():
            for key in STATES:
                full = strategy.full(parameter, key)
                if owners[name] == rank():
                    mine[f"{key}/{name}"] = full.to("cpu", copy=True).contiguous()
        if is_main_process():
            for name, buffer in strategy.buffers():
                mine[f"{BUFFER}/{name}"] = buffer.detach().to("cpu", copy=True).contiguous()
        self._report = {}
        self._pending = (step, unpublished)
        state = {"format": FORMAT, "step": step, **state}
        arguments = (unpublished, mine, state, strategy.model_config, strategy.generation_config)
        if self.settings.asynchronous:
            self._writer = threading.Thread(target=self._write_aside, args=arguments)
            self._writer.start()
        else:
            self._write(*arguments)
            self.finish()

    def _write_aside(self, *arguments: Any) -> None:
        """Write in the time that training leaves: it may be the only user of these cores."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        self._write(*arguments)

    def _write(
        self,
        folder: Path,
        tensors: dict[str, torch.Tensor],
        state: dict[str, Any],
        config: PretrainedConfig,
        generation: GenerationConfig | None,
    ) -> None:
        try:
            shard = _shard(rank(), world_size())
            described = {shard: save_file(tensors, folder / shard)}
            files: list[str] = []
            if is_main_process():
                config.save_pretrained(folder)
                files += ["config.json", "state.json"]
                if generation is not None:
                    # Not save_pretrained, which rejects the config of many published models.
                    generation.to_json_file(folder / GENERATION)
                    files.append(GENERATION)
                write_json(folder / "state.json", state)
            described |= {name: describe(folder / name) for name in files}
            self._report = {"files": described}
        except Exception as error:
            # Any error goes to the other ranks, which wait for this one's report.
            self._report = {"error": f"rank {rank()}: {error or type(error).__name__}"}

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing; publish when no rank is."""
        return self._writer is not None and self._writer.is_alive()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was started but not yet published."""
        return self._pending is not None

    def finish(self) -> None:
        """Wait until all ranks have written, and publish.

        Raises:
            RunFailed: a rank could not write; the checkpoint is removed.
        """
        if self._pending is None:
            return
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        (step, unpublished), self._pending = self._pending, None
        reports = [json.loads(text) for text in gather_strings(json.dumps(self._report))]
        errors = [report["error"] for report in reports if "error" in report]
        problem = errors[0] if errors else None
        if is_main_process():
            if problem is None:
                files = dict(ChainMap(*(report["files"] for report in reports)))
                problem = self._publish(step, unpublished, files)
            if problem is not None:
                shutil.rmtree(unpublished, ignore_errors=True)
        problem = from_main_process(problem)
        if problem is not None:
            kept = [path.name for path in published(self.folder)]
            raise RunFailed(
                f"{self.folder}: checkpoint {step} could not be written ({problem}); "
                + (f"{kept[0]} is complete" if kept else "there is no earlier one")
            )

    def _publish(self, step: int, unpublished: Path, files: dict[str, Any]) -> str | None:
        """Make the checkpoint visible by one rename; return what went wrong."""
        try:
            reached("before-manifest")
            manifest = {"format": FORMAT, "step": step, "files": files}
            write_json(unpublished / "manifest.json", manifest)
            fsync(unpublished)
            reached("before-rename")
            unpublished.rename(self.folder / folder_name(step))
        except OSError as error:
            return f"rank 0: {error}"
        reached("before-latest")
        try:
            fsync(self.folder)
            # For people and their scripts; resuming looks at the checkpoints themselves.
            write_atomically(self.folder / "latest", f"{folder_name(step)}\n")
            reached("after-latest")
            for old in published(self.folder)[self.settings.keep :]:
                # Renamed first: an interrupted deletion must not leave half a checkpoint.
                doomed = old.with_name(f".{old.name}.deleted")
                old.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        except OSError as error:
            say(f"checkpoint {step} is complete, but cleaning up {self.folder} failed: {error}")
        return None

    # ---- resuming ----

    def newest(self) -> Path | None:
        """Return the newest checkpoint whose files have the sizes and hashes of its manifest.

        A damaged one is renamed to `*.damaged` and reported. The ranks share the reading.

        Raises:
            RunFailed: there are checkpoints, renamed now or before, and none is complete.
        """
        # Rank 0 looks: another node may see an older listing of a network file system.
        found = from_main_process(json.dumps([path.name for path in published(self.folder)]))
        folders = [self.folder / name for name in json.loads(found or "[]")]
        for folder in folders:
            problem = _first(gather_strings(find_damage(folder, rank(), world_size()) or ""))
            if not problem:
                if is_main_process() and folder != folders[0]:
                    write_atomically(self.folder / "latest", f"{folder.name}\n")
                return folder
            if is_main_process():
                say(f"checkpoint {folder.name} is damaged ({problem}); trying the previous one")
                folder.rename(_free_name(folder.with_name(f"{folder.name}.damaged")))
            barrier()
        # Also when they were renamed before: starting from scratch would drop the run's metrics.
        damaged = from_main_process(str(len(list(self.folder.glob("step-*.damaged*")))))
        if int(damaged or 0):
            raise RunFailed(
                f"{self.folder}: none of the {damaged} checkpoints is complete; look at "
                "step-*.damaged, or start a new run"
            )
        return None

    def newest_folder(self) -> Path:
        """Return the folder of the newest checkpoint, which exists and was verified."""
        return published(self.folder)[0]


def prepare(folder: Path) -> None:
    """Create a folder, or remove what a killed attempt left unfinished in it; collective.

    Raises:
        RunFailed: it cannot be written.
    """
    problem = None
    if is_main_process():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except OSError as error:
            problem = str(error)
    if problem := from_main_process(problem):
        raise RunFailed(f"{folder}: cannot be written ({problem})")


def _owners(strategy: Strategy) -> dict[str, int]:
    """Return the rank that writes each parameter: the largest first, each to the least loaded."""
    sizes = {
        name: getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in strategy.parameters()
    }
    load = [0] * world_size()
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners


def _shard(part: int, parts: int) -> str:
    return f"shard-{part:05d}-of-{parts:05d}.safetensors"


def _first(texts: Iterable[str]) -> str | None:
    return next((text for text in texts if text), None)


def _free_name(path: Path) -> Path:
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}.{count}")
    return candidate


def _or_fail(action: Callable[[], Any], folder: Path) -> None:
    try:
        action()
    except OSError as error:
        raise RunFailed(f"{folder}: cannot be written: {error.strerror}") from None
