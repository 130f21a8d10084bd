"""Resolve and check the settings of a training script, and stage its data.

    python -m train.resolve train.tinyllama --resolved=FILE -- --config configs/jobs/tinyllama.yaml
    python -m train.resolve train.tinyllama --online -- --config configs/jobs/tinyllama.yaml

`make run` and `make submit` use the first: mistakes are reported here, before torch is loaded and
anything is written. `make fetch` uses the second: it downloads what is needed, once.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from train.engine import arguments
from train.engine.errors import run_to_exit, said_of_the_disk
from train.engine.script import Script


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    words, script_arguments = _split(argv)
    online = "--online" in words
    resolved = next(
        (word.partition("=")[2] for word in words if word.startswith("--resolved=")), None
    )
    names = [word for word in words if not word.startswith("--")]
    if len(names) != 1:
        raise UserError(
            "usage: python -m train.resolve MODULE [--online] [--resolved=FILE] -- SETTING..."
        )
    script = getattr(importlib.import_module(names[0]), "SCRIPT", None)
    if not isinstance(script, Script):
        raise UserError(f"{names[0]}: exports no SCRIPT (script.py); give a training script")
    config = arguments.parse(
        script.config_class, script_arguments, prog=names[0], dry_run=script.dry_run
    )
    config = _with_absolute_paths(config)
    if any(word.startswith(("--data.", "--model.")) for word in script_arguments):
        config = replace(config, staged=None)
    with said_of_the_disk():
        config = script.stage(config, online=online)
    if resolved:
        Path(resolved).write_text(arguments.to_yaml(config), encoding="utf-8")
    return 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def _with_absolute_paths(config: Any) -> Any:
    """Return `config` with absolute local paths, valid wherever the run is resumed from."""

    def absolute(path: str | None) -> str | None:
        local = path and os.path.lexists(Path(path).expanduser())
        return str(Path(path).expanduser().absolute()) if path and local else path

    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    return replace(
        config,
        **{
            name: replace(
                section, **{path: absolute(getattr(section, path)) for path in section.PATHS}
            )
            for name, section in sections.items()
            if hasattr(section, "PATHS")
        },
    )


if __name__ == "__main__":
    run_to_exit(main)
