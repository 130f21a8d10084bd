"""Packages of the user's own (EXTRA=), beside the locked ones: which, and are they still those?"""

from __future__ import annotations

import sys
from pathlib import Path

from runfolder.files import read_json


def installed() -> dict[str, str]:
    """Return name and version of those in this Python's environment or image.

    containers/venv.sh records them there.
    """
    try:
        lines = (Path(sys.prefix) / "share/extra.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return dict(line.split("==", 1) for line in lines if "==" in line)


def changed(run: Path, now: dict[str, str], where: str) -> str:
    """Return why a run must not go on with the packages `now`; empty if it began with the same."""
    began = (read_json(run / "run.json") or {}).get("extra_packages", {})
    found = []
    for name in sorted(began.keys() | now.keys()):
        before, after = began.get(name, "absent"), now.get(name, "absent")
        if before != after:
            found.append(f"{name} was {before} and is {after}")
    if not found:
        return ""
    return (
        f"the extra packages {where} are not those that the run began with: {', '.join(found)}; "
        "continue it in the image or .venv that it began in, or put these versions there (EXTRA=)"
    )
