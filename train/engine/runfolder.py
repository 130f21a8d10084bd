"""The training side's view of a run folder: its lock, its outcome, and what rank 0 says."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from train.engine.durable import write_atomically
from train.engine.errors import UserError

# A file server keeps the lock of a node that died until its lease ends: NFSv4, 90 s by default.
LEASE_S = 120


def lock(folder: Path) -> int:
    """Take the run folder for this process; the kernel gives it back when the process dies.

    In a step of Slurm's a lock that is held is waited for: the attempt that held it is over, and
    its node may be gone.

    Returns the file descriptor that holds the lock.

    Raises:
        UserError: another run holds it, or the folder cannot be written.
    """
    try:
        descriptor = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    ends = time.monotonic() + (LEASE_S if "SLUICE_STEP" in os.environ else 0)
    try:
        while not _try_to_lock(descriptor, is_last=time.monotonic() >= ends):
            time.sleep(1)
    except OSError as error:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(
                f"{folder}: another run works on it ({holder}); wait or stop it"
            ) from None
        raise UserError(
            f"{folder}: its file system has no locks ({error.strerror}); put the runs on another"
        ) from None
    os.ftruncate(descriptor, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.pwrite(
        descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode(), 0
    )
    return descriptor


def _try_to_lock(descriptor: int, *, is_last: bool) -> bool:
    """Return whether the lock is taken; where another has it, raise the last time."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if is_last or error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def attempt_folder(folder: Path) -> Path:
    """Return the folder of this attempt, $SLUICE_ATTEMPT of the run (1 when started by hand)."""
    attempt = folder / "attempts" / os.environ.get("SLUICE_ATTEMPT", "1")
    attempt.mkdir(parents=True, exist_ok=True)
    return attempt


def write_outcome(folder: Path, **outcome: Any) -> None:
    """Write the attempt's outcome.json: how it ended, and at which step."""
    write_atomically(attempt_folder(folder) / "outcome.json", json.dumps(outcome, indent=2) + "\n")


def say(text: str) -> None:
    """Print a line of the run's story; for rank 0."""
    print(text, file=sys.stdout, flush=True)
