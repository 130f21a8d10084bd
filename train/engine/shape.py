"""The shape of a model folder, as transformers finds it: determined once and kept with the data."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from train.engine.errors import check_writable_folder
from train.engine.modelfolder import MAX_HEADER, read_json, weights_of
from train.engine.once import datasets_folder, make_once, named_by_content

# Increment when `rehearsal` checks more, so that folders are checked again.
FORMAT = 2


def read_shape(folder: Path, kind: str) -> dict[str, Any]:
    """Return the shape of a model folder as `rehearsal.rehearse` found it, now or before.

    Raises:
        UserError: it is not a model of this kind.
    """
    path = folder / "config.json"
    if not isinstance(read_json(path, "model.name"), dict):
        raise UserError(f"model.name: {path} is missing, or is not a JSON object")

    # Only what stays the same when a folder is copied or mounted elsewhere, as on a node: the
    # values of the weights are checked again whenever they are loaded.
    config = hashlib.sha256(path.read_bytes()).hexdigest()
    made_of = (FORMAT, kind, config, [_identity(file) for file in weights_of(folder)])
    record = named_by_content(datasets_folder() / "shapes", *made_of)
    found: list[dict[str, Any]] = []

    def make(unfinished: Path) -> None:
        # Imports torch.
        from train.engine.rehearsal import rehearse

        found.append(rehearse(folder, kind))
        (unfinished / "shape.json").write_text(json.dumps(found[0], indent=2) + "\n")

    if not record.is_dir() and not _is_writable(record.parent):
        with tempfile.TemporaryDirectory(prefix="sluice-") as scratch:
            make(Path(scratch))
        return found[0]
    make_once(record, make, f"the config of {folder.name} and the list of its weights")
    shape: dict[str, Any] = json.loads((record / "shape.json").read_text())
    return shape


def _identity(file: Path) -> tuple[str, int, str]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(min(length, MAX_HEADER))
    return file.name, file.stat().st_size, hashlib.sha256(header).hexdigest()


def _is_writable(folder: Path) -> bool:
    try:
        check_writable_folder(folder, "SLUICE_DATASETS")
    except UserError:
        return False
    return True
