"""Put in place what a job reads: download, tokenize, pack; once, where there is a network.

    make fetch JOB=tinyllama
    python -m train.fetch train.tinyllama --online -- --config configs/jobs/tinyllama.yaml

Also resolves the job's settings for `make run`: what is wrong is said here, before torch is loaded
and before anything is written.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from train.engine import arguments
from train.engine.errors import run_to_exit, said_of_the_disk


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
            "usage: python -m train.fetch MODULE [--online] [--resolved=FILE] -- SETTING..."
        )
    script: Any = importlib.import_module(names[0])
    config = arguments.parse(script.Config, script_arguments, prog=names[0], dry_run=script.DRY_RUN)
    config = _with_absolute_paths(config)
    if any(word.startswith(("--data.", "--model.")) for word in script_arguments):
        config = replace(config, staged=None)
    try:
        with said_of_the_disk():
            config = script.stage(config, online=online)
    except KeyboardInterrupt:
        # Ctrl+C during a long download; what is half done was put away on the way here.
        return 130
    if resolved:
        Path(resolved).write_text(arguments.to_yaml(config), encoding="utf-8")
    return 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def _with_absolute_paths(config: Any) -> Any:
    """Return `config` with local paths that hold wherever the run is continued from."""

    def absolute(path: str | None) -> str | None:
        local = path and os.path.lexists(Path(path).expanduser())
        return str(Path(path).expanduser().absolute()) if path and local else path

    sections = {name: getattr(config, name) for name in ("model", "data")}
    return replace(
        config,
        **{
            name: replace(
                section, **{path: absolute(getattr(section, path)) for path in section.PATHS}
            )
            for name, section in sections.items()
        },
    )


if __name__ == "__main__":
    run_to_exit(main)
