"""The checkout: which of its files are code, and its state in git."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cluster.site import places
from cluster.site.settings import FOLDERS
from runfolder.errors import UserError

# What a checkout that was copied from a laptop says about the original.
ORIGIN = Path(".origin.json")
ORIGIN_DIFF = Path(".origin.diff")
# A checkout without git (a tarball): what is not code.
NOT_CODE = {".git", ".apptainer", ".cluster", ".venv", *FOLDERS, "site.toml"}
NOT_CODE |= {"__pycache__", str(ORIGIN), str(ORIGIN_DIFF)}
# What must not be in a run folder, which others may read; unless it is committed.
SECRETS = [".env", ".env.*", ".netrc", "*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*"]
SECRETS += ["id_ecdsa*", "secrets.*"]
SECRETS += ["*token", "*token.txt", "*credentials*", "site-*.toml", "site_*.toml"]
# A file that git does not know is code up to this size, and data above it.
MAX_UNTRACKED_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class State:
    """The files that are code, and the commit that they differ from by `diff`."""

    files: list[Path]
    commit: str | None
    """None: there is no git, or no commit yet; the files are recorded all the same."""
    diff: bytes

    def record(self) -> dict[str, str | None]:
        """Return what run.json says about it."""
        return {
            "git_commit": self.commit,
            "git_diff_sha256": hashlib.sha256(self.diff).hexdigest() if self.diff else None,
        }


def state() -> State:
    """Return the state of the checkout in the current folder, with edits that are not committed.

    Raises:
        UserError: the state that was copied from a laptop is damaged.
    """
    if ORIGIN.exists():
        return _origin()
    try:
        _git("rev-parse", "--git-dir")
        tracked = _files("ls-files")
        untracked = _files("ls-files", "--others", "--exclude-standard")
        if not tracked:
            # A tarball that was unpacked inside some other repository.
            return State(files=_code_of(_code_below(Path())), commit=None, diff=b"")
        if not _succeeds("rev-parse", "--verify", "HEAD"):
            return State(files=_code_of(untracked, tracked), commit=None, diff=b"")
        # Files that were added but not committed are treated as untracked.
        added = _files("diff", "--relative", "--cached", "--name-only", "--diff-filter=A", "HEAD")
        left_out = [f":(exclude,literal){file}" for file in added if _is_secret(file)]
        return State(
            files=[*(file for file in tracked if file not in added), *_code_of(untracked, added)],
            commit=_git("rev-parse", "HEAD").decode().strip(),
            diff=_git("diff", "HEAD", "--", ".", *left_out),
        )
    except FileNotFoundError:
        return State(files=_code_of(_code_below(Path())), commit=None, diff=b"")
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        if "not a git repository" in said:
            return State(files=_code_of(_code_below(Path())), commit=None, diff=b"")
        # Without git's answer all files would be copied, even the ignored ones.
        raise UserError(f"git: {said.splitlines()[0] if said else error}") from None


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
            f"{ORIGIN.absolute()}: is damaged ({error}); delete this folder, and the next command "
            "from the laptop copies it again"
        ) from None
    return State(files=_code_of(_code_below(Path())), commit=commit, diff=diff)


def _git(*arguments: str) -> bytes:
    # In English, because one of the messages is parsed.
    environment = os.environ | {"LC_ALL": "C"}
    words = ["git", *arguments]
    return subprocess.run(words, capture_output=True, check=True, env=environment).stdout


def _succeeds(*arguments: str) -> bool:
    return subprocess.run(["git", *arguments], capture_output=True, check=False).returncode == 0


def _files(*arguments: str) -> list[Path]:
    """Return the files that git lists and that exist."""
    names = _git(arguments[0], "-z", *arguments[1:]).split(b"\0")
    return [path for path in (Path(os.fsdecode(name)) for name in names) if path.is_file()]


def _code_below(folder: Path) -> list[Path]:
    files = []
    data = {places.folder("runs").absolute(), places.folder("datasets").absolute()}
    for entry in sorted(folder.iterdir()):
        if entry.name in NOT_CODE or entry.absolute() in data or entry.name.endswith("_cache"):
            continue
        if entry.is_dir() and not entry.is_symlink():
            files += _code_below(entry)
        elif entry.is_file():
            files.append(entry)
    return files


def _code_of(unknown: list[Path], staged: Iterable[Path] = ()) -> list[Path]:
    """Return the files that are not secrets and, if git does not know them, not data."""
    large = [file for file in unknown if file.stat().st_size > MAX_UNTRACKED_BYTES]
    small = [*staged, *(file for file in unknown if file not in large)]
    secret = [file for file in small if _is_secret(file)]
    for left_out, why in ((secret, "it looks like a secret"), (large, "over 1 MB")):
        if left_out:
            names = ", ".join(map(str, left_out))
            print(f"note: not copied ({why}): {names}", file=sys.stderr)
    return [file for file in small if file not in secret]


def _is_secret(file: Path) -> bool:
    sites = os.environ.get("SLUICE_SITE")
    is_site = bool(sites) and Path(str(sites)).absolute() == file.absolute()
    return is_site or any(fnmatch(file.name, pattern) for pattern in SECRETS)
