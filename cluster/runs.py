"""Run folders: the record of a run, and the letter box between `cluster/` and `train/`."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cluster.errors import UserError, did_you_mean

# A checkout without git (a tarball): what is not code.
NOT_CODE = {".git", ".venv", "runs", "datasets", "cache", "__pycache__", "site.toml"}


def runs_folder() -> Path:
    """Return the folder of all runs: $SLUICE_RUNS, or `runs` in the checkout."""
    return Path(os.environ.get("SLUICE_RUNS", "runs")).absolute()


def find(name: str) -> Path:
    """Return the run folder that the user means: a path, JOB/STAMP, STAMP, or JOB for its newest.

    Raises:
        UserError: there is none.
    """
    root = runs_folder()
    for candidate in (Path(name), root / name):
        if (candidate / "run.json").is_file():
            return candidate.absolute()
    below = sorted(root.glob(f"{name}/*/run.json")) or sorted(root.glob(f"*/{name}*/run.json"))
    if below:
        return below[-1].parent
    known = [str(path.parent.relative_to(root)) for path in root.glob("*/*/run.json")]
    hint = did_you_mean(name, known) if known else f"; {root} holds no runs yet"
    raise UserError(f"RUN={name}: there is no such run" + hint)


def new_name(job: str, name: str | None) -> str:
    """Return JOB/STAMP[-NAME] for a run that starts now."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    if name and not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UserError(f"NAME={name}: use letters, digits, '.', '_' and '-'")
    return f"{job}/{stamp}" + (f"-{name}" if name else "")


def create(folder: Path, *, config: str, record: dict[str, Any]) -> None:
    """Make the run folder: run.json, config.yaml and the code as it is now.

    It appears whole, by a rename.

    Raises:
        UserError: the place cannot be written.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        git = _snapshot_code(unfinished / "code")
        if diff := git.pop("diff"):
            (unfinished / "code.diff").write_bytes(diff)
        (unfinished / "config.yaml").write_text(config, encoding="utf-8")
        content = {**record, **git, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        (unfinished / "run.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"{folder.parent}: the run folder cannot be made: {error.strerror}; set SLUICE_RUNS to "
            "a folder that you can write"
        ) from None


def record(folder: Path) -> dict[str, Any]:
    """Return the run.json of a run."""
    content: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return content


def new_attempt(folder: Path) -> int:
    """Make the folder of the next attempt and return its number, 1 being the first."""
    attempts = folder / "attempts"
    attempts.mkdir(exist_ok=True)
    number = 1 + max((int(path.name) for path in attempts.iterdir() if path.name.isdigit()), default=0)
    (attempts / str(number)).mkdir()
    return number


def check_free(folder: Path) -> None:
    """Raise `UserError` if a run works on the folder; the run itself takes the lock again."""
    try:
        descriptor = os.open(folder / "run.lock", os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        raise UserError(f"{folder}: another run works on it ({holder}); wait or stop it") from None
    finally:
        os.close(descriptor)


def _snapshot_code(target: Path) -> dict[str, Any]:
    """Copy the checkout's files, with the edits that are not committed; return where it stands."""
    files, commit, diff = _git_state()
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target / file)
    return {
        "git_commit": commit,
        "git_diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
        "diff": diff,
    }


def _git_state() -> tuple[list[Path], str | None, bytes]:
    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split(b"\0")
        diff = git("diff", "HEAD")
    except (FileNotFoundError, subprocess.CalledProcessError):
        # No git, or no repository: the files are the record all the same.
        walked = [path for path in Path().rglob("*") if path.is_file()]
        return [path for path in walked if NOT_CODE.isdisjoint(path.parts)], None, b""
    files = [Path(os.fsdecode(name)) for name in listed if name]
    return [file for file in files if file.is_file()], commit, diff


def main(argv: list[str]) -> int:
    """Print the folder of a run: `python -m cluster.runs RUN`."""
    try:
        print(find(argv[0] if argv else ""))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
