"""One run at a time works on a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from runfolder.errors import UserError

# A file server keeps the lock of a node that died until its lease ends: NFSv4, 90 s by default.
LEASE_S = 120
HELD = (errno.EWOULDBLOCK, errno.EACCES)


def lock(folder: Path) -> int:
    """Take the run folder for this process; the kernel gives it back when the process dies.

    In a step of Slurm's a lock that is held is waited for: the attempt that held it is over, and
    its node may be gone.

    Returns the file descriptor that holds the lock.

    Raises:
        UserError: another run holds it, or the folder cannot be written.
    """
    descriptor = _open(folder, os.O_RDWR | os.O_CREAT)
    ends = time.monotonic() + (LEASE_S if "SLUICE_STEP" in os.environ else 0)
    try:
        while not _try(descriptor, folder, is_last=time.monotonic() >= ends):
            time.sleep(1)
    except BaseException:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
    os.pwrite(descriptor, holder.encode(), 0)
    return descriptor


def check_free(folder: Path) -> None:
    """Raise `UserError` if a run works on the folder; the run itself takes the lock again."""
    if not (folder / "run.lock").exists():
        return
    descriptor = _open(folder, os.O_RDWR)
    try:
        _try(descriptor, folder, is_last=True)
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Return whether a run works on the folder."""
    try:
        check_free(folder)
    except UserError:
        return True
    return False


def _open(folder: Path, flags: int) -> int:
    try:
        return os.open(folder / "run.lock", flags, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


def _try(descriptor: int, folder: Path, *, is_last: bool) -> bool:
    """Return whether the lock is taken; where another has it, raise the last time."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in HELD:
            raise UserError(
                f"{folder}: its file system has no locks ({error.strerror}); put the runs on "
                "another"
            ) from None
        if is_last:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise UserError(
                f"{folder}: in use by another run ({holder}); wait or stop it"
            ) from None
        return False
    return True
