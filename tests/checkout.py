"""Checkouts for the tests: the files that git has or would take, from one copy for a whole run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.shared import CHECKOUT, once, shared


def lay_out(checkout: Path, *names: str, copied: bool = False) -> Path:
    """Put the checkout's files, or those below `names` only, into the folder `checkout`.

    They are hard links to a copy that all tests share, which takes a tenth of the time: a file is
    replaced (`rewrite`), never written into. For other owners and modes, have them `copied`.
    """
    master = Path(once("checkout", _make_master))
    put = shutil.copy2 if copied else os.link
    for root, _, files in os.walk(master):
        inside = Path(root).relative_to(master)
        for file in files:
            if names and not (inside / file).as_posix().startswith(tuple(names)):
                continue
            (checkout / inside).mkdir(parents=True, exist_ok=True)
            put(Path(root, file), checkout / inside / file)
    return checkout


def rewrite(file: Path, content: str, mode: int | None = None) -> None:
    """Replace a file of such a checkout, with the mode that it had."""
    if mode is None:
        mode = file.stat().st_mode if file.exists() else 0o644
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    file.chmod(mode)


def _make_master() -> str:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    master = shared() / "master"
    for file in filter(None, listed.split("\0")):
        if (CHECKOUT / file).is_file():
            (master / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / file, master / file)
    (shared() / "master.state").write_text(state_of(master))
    return str(master)


def state_of(master: Path) -> str:
    """Return what changes with any file of the shared copy."""
    lines = []
    for path in sorted(master.rglob("*")):
        if path.is_file():
            found = path.stat()
            lines.append(
                f"{path} {found.st_size} {found.st_mtime_ns} {found.st_mode} {found.st_uid}"
            )
    return "\n".join(lines)
