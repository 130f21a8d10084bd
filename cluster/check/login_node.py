"""This machine, a login node: space in the home folder, quotas, modules, Apptainer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.plan.apptainer import find_apptainer, no_apptainer
from cluster.runs import folders
from runfolder.errors import UserError, printable

# A file server that does not answer must not hold up the rest.
PATIENCE_S = 5
KIB = 1024
USER_NAMESPACES = (
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
    ("/proc/sys/user/max_user_namespaces", "0"),
)


def facts(unknown: dict[str, str]) -> dict[str, Any]:
    """Return what the standard commands show; add to `unknown` what they do not, and why."""
    places = {
        "home": Path.home(),
        "runs": folders.runs_folder(),
        "datasets": folders.datasets_folder(),
    }
    return {
        "space": [space for name, path in places.items() if (space := _space(name, path, unknown))],
        "quotas": _quotas(unknown),
        "modules": _modules(unknown),
        "apptainer": _apptainer(unknown),
        "user_namespaces": _user_namespaces(unknown),
    }


def _space(name: str, path: Path, unknown: dict[str, str]) -> dict[str, Any] | None:
    """Return the size of the file system that a folder is or will be in."""
    existing = next((p for p in (path.absolute(), *path.absolute().parents) if p.exists()), path)
    said = _said("df", "-P", "-k", "--", str(existing))
    found = re.search(r" (\d{1,18}) +\d+ +(\d{1,18}) +\S+ +(/.*)$", said or "")
    if found is None:
        unknown[f"space of {name}"] = "df does not show it"
        return None
    return {
        "folder": name,
        "path": printable(str(path)),
        "mount": printable(found[3]),
        "bytes": int(found[1]) * KIB,
        "free_bytes": int(found[2]) * KIB,
    }


def _quotas(unknown: dict[str, str]) -> list[dict[str, Any]] | None:
    """Return my quotas, if `quota` or `lfs quota` shows them; None: unknown."""
    found = []
    asked = False
    if shutil.which("quota"):
        said = _said("quota", "-u", "-w", "-p", fails=True)
        asked = said is not None
        found += list(quota_lines(said or ""))
    if shutil.which("lfs"):
        for mount in _lustre_mounts():
            said = _said("lfs", "quota", "-q", "-u", str(os.getuid()), mount, fails=True)
            asked = asked or said is not None
            found += list(quota_lines(said or ""))
    if not asked:
        unknown["quotas"] = "no quota or lfs command here shows them"
        return None
    if not found:
        # No quota, and one that is enforced elsewhere, look alike.
        unknown["quotas"] = "quota shows none; the site may enforce them in another way"
        return None
    return found


def quota_lines(said: str) -> Iterator[dict[str, Any]]:
    """Return the quotas in the output of `quota -w -p` or `lfs quota -q`, in bytes."""
    # The file system, KiB (with a * above the limit), soft and hard limit, when grace ends, files.
    pattern = r"\s*(/?\S+)\s+\[?(\d{1,18})\]?\*?\s+(\d{1,18})\s+(\d{1,18})\s+(\S+)\s+(\d{1,18})\b"
    # A long name is on a line of its own.
    for line in re.sub(r"(?m)^(\s*\S+)\n(?=\s+\[?\d)", r"\1 ", said).splitlines():
        if found := re.match(pattern, line):
            soft, hard = int(found[3]) * KIB, int(found[4]) * KIB
            yield {
                "file_system": printable(found[1]),
                "used_bytes": int(found[2]) * KIB,
                # 0 is what quota writes for none.
                "soft_limit_bytes": soft or None,
                "hard_limit_bytes": hard or None,
                "used_files": int(found[6]),
            }


def _lustre_mounts() -> list[str]:
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line.split()[1] for line in mounts if len(line.split()) > 2 and " lustre " in line]


def _modules(unknown: dict[str, str]) -> list[str] | None:
    """Return the loaded environment modules; None: there is no such system, or it is hidden."""
    if "LOADEDMODULES" in os.environ:
        return [printable(name) for name in os.environ["LOADEDMODULES"].split(":") if name]
    if os.environ.get("MODULEPATH") or os.environ.get("LMOD_CMD"):
        return []
    unknown["modules"] = "no environment modules are set up in this shell"
    return None


def _apptainer(unknown: dict[str, str]) -> dict[str, Any] | None:
    try:
        path = find_apptainer()
    except UserError as error:
        unknown["apptainer"] = printable(str(error))
        return None
    if path is None:
        unknown["apptainer"] = no_apptainer()
        return None
    version = (_said(path, "version") or "").strip()
    if not version:
        unknown["apptainer"] = f"{path} version: no answer"
    return {"path": printable(path), "version": printable(version) or None}


def _user_namespaces(unknown: dict[str, str]) -> bool | None:
    """Return whether this user may make user namespaces, by making one; None: unknown."""
    if shutil.which("unshare") is None:
        unknown["user_namespaces"] = "there is no unshare command here"
        return None
    allowed = _said("unshare", "--user", "--map-root-user", "true") is not None
    if not allowed:
        for path, value in USER_NAMESPACES:
            try:
                if Path(path).read_text(encoding="utf-8").strip() == value:
                    unknown["user_namespaces"] = f"forbidden by {path} = {value}"
                    break
            except OSError:
                continue
    return allowed


def _said(*command: str, fails: bool = False) -> str | None:
    """Return what a command prints; None if it failed or did not end. `fails`: ignore its code."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if fails or done.returncode == 0 else None
