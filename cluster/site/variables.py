"""Environment variables: those that site.toml and job files set, and those in their paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runfolder import moments
from runfolder.errors import UserError

# Variables that are read-only in bash.
OF_BASH = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}
# Those that have a value of ours, or of the launcher's, in each process: another would be lost.
SET_ANYWAY = {"HF_HOME", "HF_HUB_OFFLINE", "MASTER_ADDR", "MASTER_PORT", "PET_SIGNALS_TO_HANDLE"}
SET_ANYWAY |= {"PYTHONNOUSERSITE", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"}
SET_ANYWAY |= {"TRITON_CACHE_DIR", "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE"}
SET_ANYWAY |= {"LOCAL_WORLD_SIZE", "PATH", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"}


def faults(table: dict[str, Any]) -> Iterator[str]:
    """Find what is wrong with the variables that a file sets for the processes of a run."""
    for name, value in table.items():
        is_ours = name.startswith("SLUICE_") and name != moments.VARIABLE
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"environment.{name}: is not a valid variable name"
        elif is_ours or name in OF_BASH:
            yield f"environment.{name}: is reserved; leave it out"
        elif name in SET_ANYWAY:
            yield f"environment.{name}: Sluice sets it for each process; leave it out"
        elif not isinstance(value, str):
            yield f"environment.{name}: {value!r} must be a string in quotes"


def check_variables(path: Path, table: dict[str, Any]) -> dict[str, str]:
    """Return the variables that a file sets for the processes of a run.

    Raises:
        UserError: one has no name of a variable, or one that is not the file's to set.
    """
    for fault in faults(table):
        raise UserError(f"{path}: {fault}")
    return dict(table)


def expanded(path: Path | None, key: str, value: str) -> str:
    """Return a path of site.toml with `~` and the user's own variables in it replaced.

    Raises:
        UserError: a variable is not set.
    """
    if name := unset(value):
        raise UserError(f"{path}: {key}: ${name} is not set in your environment")
    return _expand(value)


def unset(value: str) -> str:
    """Return the first variable in a path that your environment does not have; else ""."""
    found = re.search(r"\$\{?(\w+)", _expand(value))
    return found[1] if found else ""


def _expand(value: str) -> str:
    return os.path.expandvars(os.path.expanduser(value))  # noqa: PTH111 "" stays ""
