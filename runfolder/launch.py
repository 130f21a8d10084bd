"""launch.env: all that `slurm/` knows about a run, resolved once, by `make run` or `make submit`.

Lines of NAME='value' that bash can source and people can read. Names in lower case are for the
scripts of `slurm/`, and their paths are those of the host; `export` passes the others to every
process of the run.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from runfolder.errors import UserError
from runfolder.files import write_atomically

NAME = "launch.env"


def write(run: Path, values: Mapping[str, str], exported: Mapping[str, str]) -> None:
    """Write the launch.env of a run.

    Raises:
        OSError: it cannot be written.
    """
    lines = ["# What slurm/ does for this run; each `make run` and `make submit` rewrites it."]
    lines += [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exported.items()]
    write_atomically(run / NAME, "\n".join(lines) + "\n")


def read(run: Path) -> dict[str, str]:
    """Return the values of a run's launch.env, including the exported ones.

    Raises:
        UserError: it is missing, or damaged.
    """
    path = run / NAME
    try:
        words = shlex.split(path.read_text(encoding="utf-8"), comments=True)
        pairs = [word.partition("=") for word in words if word != "export"]
        if not all(name.isidentifier() and equals for name, equals, _ in pairs):
            raise ValueError("it has lines other than NAME='value'")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return {name: value for name, _, value in pairs}
