"""A job's settings as its script resolves them, before anything is queued or written."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster.plan import container
from cluster.plan.program import MODULE, Program
from cluster.plan.runtime import Runtime
from cluster.runs import folders
from cluster.site import places
from runfolder.checkpoints import made_with, published
from runfolder.errors import UserError
from runfolder.files import read_json

# What a checkpoint calls otherwise than the settings do.
SAVED_AS = {
    "data": "staged.train",
    "validation": "staged.validation",
    "prompts": "sample.prompts",
    "sequence_length": "data.sequence_length",
}


def settings(
    runtime: Runtime,
    module: str,
    script_arguments: list[str],
    environment: dict[str, str],
    code_folder: Path,
) -> str | int:
    """Return the job's settings as its script resolves them, or the script's exit code."""
    datasets_missing = not folders.datasets_folder().exists()
    with tempfile.TemporaryDirectory(prefix="sluice-") as scratch:
        resolved = Path(scratch) / "config.yaml"
        code = container.call(
            runtime,
            "train.resolve",
            [module, f"--resolved={resolved}", "--", *script_arguments],
            code=code_folder,
            environment=environment,
            writable=[Path(scratch), *_writable_folders(environment)] if runtime.image else [],
        )
        if datasets_missing and not resolved.exists() and _is_empty(folders.datasets_folder()):
            # It was created only for the container.
            folders.datasets_folder().rmdir()
        # With --help, or settings that it refuses, the script has said everything.
        return resolved.read_text(encoding="utf-8") if resolved.exists() else code


def check_goes_on(run: Path, config: dict[str, Any]) -> None:
    """Check the settings of a run to continue against those that its newest checkpoint depends on.

    Here those that are in a checkpoint by their names, so that nothing waits in a queue to be
    refused; the script compares the rest, such as the weights under adapters.

    Raises:
        UserError: one is another.
    """
    for checkpoint in published(run / "checkpoints")[:1]:
        for name, was in (read_json(checkpoint / "state.json") or {}).items():
            now: Any = config
            for key in SAVED_AS.get(name, name).split("."):
                now = now.get(key, was) if isinstance(now, dict) else was
            # A length that is not set is the model's; a list may stand for what the settings have
            # in another form, such as the phases of lab 3.
            is_open = name == "sequence_length" and now is None
            is_plain = not any(isinstance(value, list | dict) for value in (was, now))
            if now != was and (is_plain or name in SAVED_AS) and not is_open:
                raise made_with(checkpoint, name, was, now)


def program_settings(
    runtime: Runtime,
    program: Program,
    words: list[str],
    environment: dict[str, str],
    *,
    before: Path | None,
    is_copied: bool,
) -> str | int:
    """Return the config.yaml of a script that is not ours, or the exit code of a refusal.

    `before`: that of a run that continues. `is_copied`: the job brings its code along, so that it
    need not be installed.
    """
    made(folders.datasets_folder(), "SLUICE_DATASETS")
    # It is a word to make and not to the script, which need not know it.
    dry_run = "--dry_run" in words
    words = [word for word in words if word != "--dry_run"]
    if before is not None:
        known = json.loads(before.read_text(encoding="utf-8"))
        # What was given with an earlier launch is still said.
        return json.dumps(known | {"arguments": known["arguments"] + words}, indent=2) + "\n"
    if program.kind != "script" and not is_copied:
        find = [f"--find={program.kind}", program.name]
        if code := container.call(runtime, MODULE, find, code=Path.cwd(), environment=environment):
            return code
    return program.config(words, dry_run=dry_run)


def _writable_folders(environment: dict[str, str]) -> list[Path]:
    """Return the datasets folder, created if it is missing, and the cache if there is one."""
    writable = [made(folders.datasets_folder(), "SLUICE_DATASETS")]
    home = Path(environment["HF_HOME"]).absolute()
    return [*writable, home] if home.is_dir() else writable


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def caches(environment: dict[str, str]) -> list[Path]:
    """Return the folders that a download writes to, created if they are missing."""
    names = [name for name in environment if re.fullmatch(r"HF_([A-Z]+_)*(HOME|CACHE)", name)]
    places = [(Path(environment[name]).expanduser().absolute(), name) for name in names]
    return [
        made(folders.datasets_folder(), "SLUICE_DATASETS"),
        *(made(*place) for place in places),
    ]


def made(folder: Path, variable: str) -> Path:
    """Return a folder that a variable names, created if it is missing.

    Raises:
        UserError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{variable}: {folder} cannot be created: {error.strerror}; choose another place"
        ) from None
    return folder


def environment() -> dict[str, str]:
    """Return the environment of the training modules, with the places of their data."""
    cache = cache_folder()
    # Where `hf auth login` puts the token, which is not part of the cache.
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"
    no_bars = "0" if sys.stderr.isatty() else "1"
    defaults = {
        "HF_HUB_DISABLE_PROGRESS_BARS": no_bars,
        "HF_DATASETS_DISABLE_PROGRESS_BARS": no_bars,
        # Requests only for statistics; without a network each would wait for its timeout.
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    }
    if "HF_HOME" not in os.environ:
        defaults |= {"HF_HOME": str(cache / "huggingface"), "HF_TOKEN_PATH": str(home / "token")}
    ours = {"SLUICE_DATASETS": str(folders.datasets_folder()), "PYTHONNOUSERSITE": "1"}
    return defaults | dict(os.environ) | ours


def cache_folder() -> Path:
    """Return the folder of downloads: $SLUICE_CACHE, or site.toml's, or `cache` in the checkout."""
    return places.here() / places.folder("cache")


def short(path: Path) -> str:
    """Return a path for messages: relative to the checkout, if it is below it."""
    here = places.here()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
