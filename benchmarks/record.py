"""The record of a measurement: its figures with all circumstances, never a host's name or a path.

Only the standard library is needed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "accelerate", "tokenizers", "numpy")


def circumstances() -> dict[str, Any]:
    """Return the date, commit, software and machine of this process."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": {"name": _cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def nvidia_smi(*fields: str) -> dict[str, str] | None:
    """Return what nvidia-smi says about the GPU that is used, or None."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    command = ["nvidia-smi", f"--id={visible}", f"--query-gpu={','.join(fields)}"]
    try:
        text = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in text.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def save(folder: Path, name: str, record: dict[str, Any]) -> Path:
    """Write `record` as FOLDER/NAME.json; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write(path, record)
    return path


def write(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as JSON, atomically: the writer may be killed at any time."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def without_paths(text: str) -> str:
    """Return `text` with every absolute path cut down to its last part."""
    return re.sub(r"(?<![\w.])/(?:[^\s'\",:;()/]+/)+([^\s'\",:;()/]*)", r"\1", text)


def _git() -> dict[str, Any] | None:
    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else None
