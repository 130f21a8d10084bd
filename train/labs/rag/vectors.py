"""Vectors of a run in progress: kept in shards; each checkpoint lists its shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from runfolder.checkpoints import folder_name, published
from runfolder.files import write_json
from train.engine.checkpoint import Checkpoints, prepare
from train.engine.distributed import is_main_process, rank, world_size
from train.engine.durable import describe
from train.engine.errors import RunFailed
from train.engine.settings import CheckpointSettings
from train.engine.story import say

FORMAT = 1


class VectorCheckpoints(Checkpoints):
    """Checkpoints that grow: each adds a shard of vectors per rank to the previous ones.

    The shards are in `vectors` beside the checkpoints' folder, so that deleting old checkpoints
    deletes no vector. A checkpoint's manifest has size and hash of every shard so far: a damaged
    shard spoils the checkpoints since then, and the one before is used, if it still exists.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        super().__init__(folder, settings)
        self.shards = folder.parent / "vectors"
        prepare(self.shards)

    def save_vectors(
        self, step: int, vectors: dict[int, np.ndarray], state: dict[str, Any]
    ) -> None:
        """Write this rank's new vectors, by their chunk's number, and publish checkpoint `step`.

        All ranks take part, even those that have none.

        Raises:
            RunFailed: it could not be written; earlier checkpoints are unchanged.
        """
        unpublished = self.folder / f".{folder_name(step)}"
        self._report = {}
        try:
            files: dict[str, Any] = {}
            if vectors:
                name = f"{folder_name(step)}-{rank():05d}-of-{world_size():05d}.safetensors"
                hidden = self.shards / f".{name}"
                numbers = np.array(list(vectors), dtype=np.int64)
                save_file({"numbers": numbers, "vectors": np.stack(list(vectors.values()))}, hidden)
                # safetensors creates files that only the owner can read.
                hidden.chmod(self.shards.stat().st_mode & 0o666)
                entry = describe(hidden)
                hidden.rename(self.shards / name)
                files[f"../../vectors/{name}"] = entry
            if is_main_process():
                unpublished.mkdir(exist_ok=True)
                state = {"format": FORMAT, "step": step, **state}
                write_json(unpublished / "state.json", state)
                files["state.json"] = describe(unpublished / "state.json")
                for before in published(self.folder)[:1]:
                    files |= _shards_of(before)
            self._report = {"files": files}
        except Exception as error:
            # Any error goes to the other ranks, which wait for this one's report.
            self._report = {"error": f"rank {rank()}: {error or type(error).__name__}"}
        self._pending = (step, unpublished)
        self.finish()

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint; None, with a message, if all are damaged.

        A damaged shard older than the oldest kept checkpoint spoils them all. Only time is lost:
        vectors can be computed again.
        """
        try:
            return super().newest()
        except RunFailed:
            if is_main_process():
                say("no checkpoint is complete; all chunks are embedded again")
            return None


def load(checkpoint: Path, count: int) -> np.ndarray:
    """Return the vectors, (count, D), of a checkpoint that has all of them."""
    shards = [load_file(checkpoint / name) for name in sorted(_shards_of(checkpoint))]
    vectors = np.full((count, shards[0]["vectors"].shape[1]), np.nan, dtype=np.float32)
    for shard in shards:
        vectors[shard["numbers"]] = shard["vectors"]
    assert np.isfinite(vectors).all(), f"{checkpoint}: lacks vectors"
    return vectors


def _shards_of(checkpoint: Path) -> dict[str, Any]:
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    return {name: entry for name, entry in manifest["files"].items() if "/vectors/" in name}
