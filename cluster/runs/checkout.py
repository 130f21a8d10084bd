"""The code of a run: which files of the checkout, or of a script's folder; its state in git."""

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
from functools import partial
from pathlib import Path
from typing import Any

from cluster.site import places
from cluster.site.settings import FOLDERS
from runfolder.errors import UserError

# What a checkout, or a script's folder, that was copied from a laptop says about the original.
ORIGIN = Path(".sluice-origin.json")
ORIGIN_DIFF = Path(".sluice-origin.diff")
# A checkout without git (a tarball): what is not code.
NOT_CODE = {".git", ".apptainer", ".cluster", ".venv", *FOLDERS, "site.toml"}
NOT_CODE |= {"__pycache__", str(ORIGIN), str(ORIGIN_DIFF)}
# What must not be in a run folder, which others may read; unless it is committed.
SECRETS = [".env", ".env.*", ".netrc", "*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*"]
SECRETS += ["id_ecdsa*", "secrets.*"]
SECRETS += ["*token", "*token.txt", "*credentials*", "site-*.toml", "site_*.toml"]
# A file that git does not know is code up to this size, and data above it.
MAX_UNTRACKED_BYTES = 1_000_000
# A script's folder with more is a home, or data.
MAX_FILES = 5_000
# Without git: what is no code beside a script.
NOT_A_SCRIPTS = {".git", ".venv", "venv", ".ipynb_checkpoints", "__pycache__"}
NOT_A_SCRIPTS |= {str(ORIGIN), str(ORIGIN_DIFF)}


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


def state(root: Path = Path()) -> State:
    """Return the state of the checkout in the current folder, with edits that are not committed.

    With `root` that of a script's folder; files are seen from there.

    Raises:
        UserError: the state that was copied from a laptop is damaged, or a script's folder holds
            more files than code has.
    """
    found = _state(root)
    if root != Path() and len(found.files) > MAX_FILES:
        raise _too_many(root)
    return found


def place_of(root: Path) -> str:
    """Return where a script's folder is: its path, or the one on the laptop it was copied from."""
    return str(_read_origin(root)["folder"] if (root / ORIGIN).exists() else root.resolve())


def origin(found: State, **more: str) -> dict[str, bytes]:
    """Return the files that tell a copy of a folder about the original."""
    told = {"git_commit": found.commit, **more}
    return {str(ORIGIN): json.dumps(told).encode(), str(ORIGIN_DIFF): found.diff}


def _state(root: Path) -> State:
    if (root / ORIGIN).exists():
        return _origin(root)
    without_git = partial(_without_git, root)
    try:
        _git(root, "rev-parse", "--git-dir")
        tracked = _files(root, "ls-files")
        untracked = _files(root, "ls-files", "--others", "--exclude-standard")
        if not tracked:
            # A tarball that was unpacked inside some other repository.
            return without_git()
        if not _succeeds(root, "rev-parse", "--verify", "HEAD"):
            return State(files=_code_of(root, untracked, tracked), commit=None, diff=b"")
        # Files that were added but not committed are treated as untracked.
        words = ["diff", "--relative", "--cached", "--name-only", "--diff-filter=A", "HEAD"]
        added = _files(root, *words)
        left_out = [f":(exclude,literal){file}" for file in added if _is_secret(root / file)]
        return State(
            files=[
                *(file for file in tracked if file not in added),
                *_code_of(root, untracked, added),
            ],
            commit=_git(root, "rev-parse", "HEAD").decode().strip(),
            diff=_git(root, "diff", "HEAD", "--", ".", *left_out),
        )
    except FileNotFoundError:
        return without_git()
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        if "not a git repository" in said:
            return without_git()
        # Without git's answer all files would be copied, even the ignored ones.
        raise UserError(f"git: {said.splitlines()[0] if said else error}") from None


def copy(target: Path, root: Path = Path()) -> dict[str, Any]:
    """Copy the code below `root` to `target`; return its `record`, and the diff.

    Raises:
        OSError: it cannot be written.
        UserError: a script's folder holds more files than code has.
    """
    found = state(root)
    for file in found.files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / file, target / file)
    return {**found.record(), "diff": found.diff}


def _without_git(root: Path) -> State:
    return State(files=_code_of(root, _code_below(root)), commit=None, diff=b"")


def _too_many(root: Path) -> UserError:
    return UserError(
        f"{root}: holds more than {MAX_FILES:,} files, and each run gets a copy of its script's "
        "folder; put the script into a folder of its own"
    )


def _origin(root: Path) -> State:
    commit = _read_origin(root)["git_commit"]
    # Beside a script, what is no code was left out before it was copied.
    files = _code_below(root) if root != Path() else _code_of(root, _code_below(root))
    try:
        return State(files=files, commit=commit, diff=(root / ORIGIN_DIFF).read_bytes())
    except OSError as error:
        raise _damaged(root, error) from None


def _read_origin(root: Path) -> dict[str, Any]:
    try:
        told = json.loads((root / ORIGIN).read_text(encoding="utf-8"))
        return {"git_commit": told["git_commit"], "folder": told.get("folder")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(root, error) from None


def _damaged(root: Path, error: Exception) -> UserError:
    return UserError(
        f"{(root / ORIGIN).absolute()}: is damaged ({error}); delete this folder, and the next "
        "command from the laptop copies it again"
    )


def _git(root: Path, *arguments: str) -> bytes:
    # In English, because one of the messages is parsed.
    environment = os.environ | {"LC_ALL": "C"}
    words = ["git", *arguments]
    return subprocess.run(words, cwd=root, capture_output=True, check=True, env=environment).stdout


def _succeeds(root: Path, *arguments: str) -> bool:
    words = ["git", *arguments]
    return subprocess.run(words, cwd=root, capture_output=True, check=False).returncode == 0


def _files(root: Path, *arguments: str) -> list[Path]:
    """Return the files that git lists and that exist."""
    names = _git(root, arguments[0], "-z", *arguments[1:]).split(b"\0")
    paths = (Path(os.fsdecode(name)) for name in names if name)
    return [path for path in paths if (root / path).is_file()]


def _code_below(root: Path) -> list[Path]:
    """Return the files below a folder without git that may be code, seen from there."""
    data = {places.folder("runs").absolute(), places.folder("datasets").absolute()}
    not_code = NOT_CODE if root == Path() else NOT_A_SCRIPTS
    files: list[Path] = []
    links: list[Path] = []
    for place, folders, names in os.walk(root):
        folder = Path(place)
        if root != Path():
            links += [folder / name for name in folders if (folder / name).is_symlink()]
        folders[:] = sorted(
            name
            for name in folders
            if name not in not_code
            and not name.endswith("_cache")
            and (folder / name).absolute() not in data
            and not (folder / name).is_symlink()
        )
        for name in sorted(names):
            path = folder / name
            if name not in not_code and not name.endswith("_cache") and path.is_file():
                files.append(path.relative_to(root))
        if root != Path() and len(files) > MAX_FILES:
            raise _too_many(root)
    if links:
        said = ", ".join(map(str, links))
        print(f"note: not copied (a link to a folder): {said}", file=sys.stderr)
    return files


def _code_of(root: Path, unknown: list[Path], staged: Iterable[Path] = ()) -> list[Path]:
    """Return the files that are not secrets and, if git does not know them, not data."""
    large = [file for file in unknown if (root / file).stat().st_size > MAX_UNTRACKED_BYTES]
    small = [*staged, *(file for file in unknown if file not in large)]
    secret = [file for file in small if _is_secret(root / file)]
    for left_out, why in ((secret, "it looks like a secret"), (large, "over 1 MB")):
        if left_out:
            names = ", ".join(str(root / file) for file in left_out)
            print(f"note: not copied ({why}): {names}", file=sys.stderr)
    return [file for file in small if file not in secret]


def _is_secret(file: Path) -> bool:
    sites = os.environ.get("SLUICE_SITE")
    is_site = bool(sites) and Path(str(sites)).absolute() == file.absolute()
    return is_site or any(fnmatch(file.name, pattern) for pattern in SECRETS)
