"""The checkout: which of its files are code, and where it stands in git."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cluster import site
from cluster.errors import UserError

# What a checkout that was brought from a laptop says of the one that it was made from.
ORIGIN = Path(".origin.json")
ORIGIN_DIFF = Path(".origin.diff")
# A checkout without git (a tarball): what is not code.
NOT_CODE = {".git", ".apptainer", ".cluster", ".venv", *site.FOLDERS, "site.toml"}
NOT_CODE |= {"__pycache__", str(ORIGIN), str(ORIGIN_DIFF)}
# What must not lie in a run folder, which others may read; unless it is committed.
SECRETS = [".env", ".env.*", ".netrc", "*.pem", "*.key", "id_rsa*", "id_ed25519*"]
SECRETS += ["*token", "*token.txt", "*credentials*", "site-*.toml", "site_*.toml"]
# A file that git does not know is code up to this size, and data above it.
MAX_UNTRACKED_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class State:
    """The files that are code, and the commit that they differ from by `diff`."""

    files: list[Path]
    commit: str | None
    """None: there is no git, or no commit yet; the files are the record all the same."""
    diff: bytes

    def record(self) -> dict[str, str | None]:
        """Return what run.json says of it."""
        return {
            "git_commit": self.commit,
            "git_diff_sha256": hashlib.sha256(self.diff).hexdigest() if self.diff else None,
        }


def state() -> State:
    """Return the state of the checkout in the current folder, with edits that are not committed.

    Raises:
        UserError: what was brought along from a laptop is damaged.
    """
    if ORIGIN.exists():
        return _origin()
    try:
        commit = _git("rev-parse", "HEAD").decode().strip()
        tracked, untracked = _listed(), _listed("--others", "--exclude-standard")
        diff = _git("diff", "HEAD")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return State(files=_code_below(Path()), commit=None, diff=b"")
    if not tracked:
        # A tarball that was unpacked inside some other repository.
        return State(files=_code_below(Path()), commit=None, diff=b"")
    return State(files=tracked + _harmless(untracked), commit=commit, diff=diff)


def copy(target: Path) -> dict[str, Any]:
    """Copy the code to `target`; return its `record`, and the diff.

    Raises:
        OSError: it cannot be written.
    """
    found = state()
    for file in found.files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target / file)
    return {**found.record(), "diff": found.diff}


def _origin() -> State:
    try:
        commit = json.loads(ORIGIN.read_text(encoding="utf-8"))["git_commit"]
        diff = ORIGIN_DIFF.read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{ORIGIN.absolute()}: is damaged ({error}); delete this folder, the next command "
            "from the laptop makes it anew"
        ) from None
    return State(files=_code_below(Path()), commit=commit, diff=diff)


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout


def _listed(*options: str) -> list[Path]:
    names = _git("ls-files", "-z", *options).split(b"\0")
    return [path for path in (Path(os.fsdecode(name)) for name in names) if path.is_file()]


def _code_below(folder: Path) -> list[Path]:
    files = []
    data = {site.folder("runs").absolute(), site.folder("datasets").absolute()}
    for entry in sorted(folder.iterdir()):
        if entry.name in NOT_CODE or entry.absolute() in data or entry.name.endswith("_cache"):
            continue
        if entry.is_dir() and not entry.is_symlink():
            files += _code_below(entry)
        elif entry.is_file():
            files.append(entry)
    return _harmless(files)


def _harmless(files: list[Path]) -> list[Path]:
    """Return those that are no data and no secrets."""
    left_out = [file for file in files if _is_secret(file)]
    if left_out:
        names = ", ".join(map(str, left_out))
        print(f"note: not copied to the run, as it looks like a secret: {names}", file=sys.stderr)
    small = [file for file in files if file.stat().st_size <= MAX_UNTRACKED_BYTES]
    return [file for file in small if file not in left_out]


def _is_secret(file: Path) -> bool:
    sites = os.environ.get("SLUICE_SITE")
    is_site = bool(sites) and Path(str(sites)).absolute() == file.absolute()
    return is_site or any(fnmatch(file.name, pattern) for pattern in SECRETS)
