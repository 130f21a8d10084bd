"""Only one run at a time uses a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from runfolder.errors import UserError

# A file server keeps a dead node's lock until its lease expires: with NFSv4, 90 s by default.
LEASE_S = 120
HELD = (errno.EWOULDBLOCK, errno.EACCES)


def lock(folder: Path) -> int:
    """Lock the run folder for this process; the kernel releases the lock when the process dies.

    In a Slurm step, wait for a lock that is held: the attempt that held it is over, and its node
    may be gone.

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
    """Raise `UserError` if a run is using the folder; the lock is not kept."""
    if not (folder / "run.lock").exists():
        return
    descriptor = _open(folder, os.O_RDWR)
    try:
        _try(descriptor, folder, is_last=True)
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Return whether a run is using the folder."""
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
    """Return whether the lock was taken; if another run holds it, raise on the last try."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in HELD:
            raise UserError(
                f"{folder}: its file system does not support locks ({error.strerror}); put the "
                "runs on another"
            ) from None
        if is_last:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise UserError(
                f"{folder}: in use by another run ({holder}); wait or stop it"
            ) from None
        return False
    return True
