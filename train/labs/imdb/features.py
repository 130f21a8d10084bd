"""The vectors of texts from a frozen encoder: computed once, by all ranks together.

A frozen encoder gives the same vector for a text in every epoch, if dropout is off. So each text
goes through it once; training on the vectors then costs next to nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from runfolder.files import write_json
from train.engine import encoders, signals
from train.engine.distributed import agree, from_main_process, is_main_process, world_size
from train.engine.durable import describe, sha256
from train.engine.errors import RunFailed
from train.engine.models import weights_sha256
from train.engine.shares import gather_in_order, share
from train.engine.story import say

# Rows in a file: the most that a stopped run loses.
ROWS_PER_FILE = 1024
# Texts in one forward pass; and passes of a rank between two checks for signals.
BATCH_SIZE = 32
PASSES_BETWEEN_LOOKS = 4


def embed_together(
    encoder: PreTrainedModel,
    token_rows: Sequence[Sequence[int]],
    *,
    device: torch.device,
    bf16: bool = False,
) -> torch.Tensor | None:
    """Return the vectors (N, D), fp32 on the CPU, of all N rows on every rank; collective.

    Each rank embeds its share, dropout off. None: a rank was asked to stop.
    """
    # Sorted by length before the split, so that ranks have equal work and batches little padding.
    order = sorted(range(len(token_rows)), key=lambda i: (-len(token_rows[i]), i))
    own_rows = [token_rows[order[i]] for i in share(len(order))]
    largest_share = -(-len(order) // world_size())
    parts = []
    for start in range(0, largest_share, BATCH_SIZE * PASSES_BETWEEN_LOOKS):
        if agree(signals.received() is not None, device=device)[0] > 0:
            return None
        rows = own_rows[start : start + BATCH_SIZE * PASSES_BETWEEN_LOOKS]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            parts.append(encoders.embed_all(encoder, rows, batch_size=BATCH_SIZE, device=device))
    gathered = gather_in_order(torch.cat(parts).numpy(), total=len(order))
    vectors = torch.empty(gathered.shape)
    vectors[order] = torch.from_numpy(gathered)
    return vectors


def fingerprint(encoder: nn.Module, token_rows: Sequence[Sequence[int]]) -> dict[str, str]:
    """Return what the vectors depend on: a hash of the weights and one of the rows' tokens."""
    rows = hashlib.sha256()
    for tokens in token_rows:
        rows.update(json.dumps(list(tokens)).encode())
    return {"encoder": weights_sha256(encoder), "rows": rows.hexdigest()}


def cached_features(
    folder: Path,
    encoder: PreTrainedModel,
    token_rows: Sequence[Sequence[int]],
    *,
    device: torch.device,
    bf16: bool = False,
) -> torch.Tensor | None:
    """Return the vectors (N, D) of `token_rows`, from `folder` if they are there; collective.

    `folder` gets a file for every 1,024 rows as soon as they are computed, and manifest.json.
    Files that are damaged, or from another encoder or other rows, are reported and computed again.
    None: a rank was asked to stop; the files so far are kept.
    """
    made_of = {**fingerprint(encoder, token_rows), "precision": "bf16" if bf16 else "fp32"}
    manifest = _read_manifest(folder, made_of)
    parts = []
    for start in range(0, len(token_rows), ROWS_PER_FILE):
        name = f"rows-{start:08d}.safetensors"
        if name in manifest["files"]:
            parts.append(load_file(folder / name)["vectors"])
            continue
        rows = token_rows[start : start + ROWS_PER_FILE]
        vectors = embed_together(encoder, rows, device=device, bf16=bf16)
        if vectors is None:
            return None
        problem = None
        if is_main_process():
            try:
                _write(folder, name, vectors, manifest)
            except (OSError, SafetensorError) as error:
                problem = str(error)
            else:
                say(f"features of {start + len(rows):,} of {len(token_rows):,} {folder.name} rows")
        # The others must learn of it: they would wait for rank 0 in the next collective.
        if problem := from_main_process(problem):
            raise RunFailed(f"{folder}: {name} could not be written ({problem})")
        parts.append(vectors)
    return torch.cat(parts)


def _read_manifest(folder: Path, made_of: dict[str, str]) -> dict[str, Any]:
    """Return the manifest, with only the files that are complete; rank 0 checks, for all."""
    manifest: dict[str, Any] = {"made_of": made_of, "files": {}}
    if is_main_process() and (folder / "manifest.json").exists():
        manifest = _checked(folder, manifest)
    agreed: dict[str, Any] = json.loads(from_main_process(json.dumps(manifest)) or "")
    return agreed


def _checked(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        found, files = manifest["made_of"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        say(f"{folder}: manifest.json cannot be read; computing the features again")
        return expected
    other = [key for key, value in expected["made_of"].items() if found.get(key) != value]
    if other:
        say(f"{folder}: was made with another {' and '.join(other)}; computing the features again")
        return expected
    whole = {name: entry for name, entry in files.items() if _is_whole(folder / name, entry)}
    if damaged := sorted(set(files) - set(whole)):
        say(f"{folder}: {', '.join(damaged)} is damaged; computing its features again")
    return {**expected, "files": whole}


def _is_whole(path: Path, entry: dict[str, Any]) -> bool:
    try:
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            return False
        load_file(path)["vectors"]
    except (OSError, KeyError, TypeError, SafetensorError):
        return False
    return True


def _write(folder: Path, name: str, vectors: torch.Tensor, manifest: dict[str, Any]) -> None:
    """Write a file of vectors, rename it into place, then add it to the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.tmp"
    save_file({"vectors": vectors.contiguous()}, temporary)
    # safetensors creates files that only the owner can read; the folder follows the umask.
    temporary.chmod(folder.stat().st_mode & 0o666)
    manifest["files"][name] = describe(temporary)
    temporary.replace(folder / name)
    write_json(folder / "manifest.json", manifest)
