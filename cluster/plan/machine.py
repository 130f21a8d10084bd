"""What this machine has: GPUs, the Python environment of the host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def gpus() -> list[str]:
    """Return the GPUs that torch will see here, found without torch."""
    if os.environ.get("SLUICE_DEVICE") == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [device.strip() for device in visible.split(",")]
        return [device for device in named if device not in ("", "-1")]
    return [path.name for path in Path("/dev").glob("nvidia[0-9]*")]


def environment_variant() -> str | None:
    """Return which build of torch this environment is for, cpu or cuda; None if unknown.

    That is an environment that containers/venv.sh did not create.
    """
    stamp, lock = (Path(sys.prefix) / name for name in (".sluice-stamp", ".sluice-lock"))
    if stamp.is_file():
        lines = stamp.read_text(encoding="utf-8").splitlines()
        return "cuda" if any(line.startswith("cuda ") for line in lines) else "cpu"
    return "cpu" if lock.exists() else None


def complete_environment() -> None:
    """Install the training packages in this environment, if it has only those of the commands.

    If that fails, containers/venv.sh has said why, and this process exits with its code.
    """
    variant = environment_variant()
    if variant is None:
        return
    prefix = Path(sys.prefix)
    short = prefix.relative_to(Path.cwd()) if prefix.is_relative_to(Path.cwd()) else prefix
    command = ["containers/venv.sh", f"--{variant}"]
    code = subprocess.call(command, env={**os.environ, "VENV": str(short)})
    if code:
        sys.exit(code)
