"""Waiting for what happens, and ending what hangs with a look at where it stands."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# No run of these tests takes a tenth of it on an idle machine: what takes longer hangs.
HANGS_AFTER_S = 1200


def wait_until(
    happened: Callable[[], object],
    what: str,
    timeout: float = HANGS_AFTER_S,
    every_s: float = 0.1,
    so_far: Callable[[], str] = lambda: "",
) -> None:
    """Wait until `happened`; fail with `what`, and what `so_far` tells, after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not happened():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {timeout:.0f} s: {what}\n{so_far()}")
        time.sleep(every_s)


def run(
    command: Sequence[str | Path],
    *,
    cwd: str | Path,
    env: Mapping[str, str],
    timeout: float = HANGS_AFTER_S,
    **more: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; one that hangs fails with the stacks of its Python processes.

    `more` is for Popen: whose process it is, and the like.
    """
    return finish(start(command, cwd=cwd, env=env, **more), timeout)


def start(
    command: Sequence[str | Path], *, cwd: str | Path, env: Mapping[str, str], **more: Any
) -> subprocess.Popen[str]:
    """Start a command for `finish`."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**env, "PYTHONFAULTHANDLER": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def finish(
    process: subprocess.Popen[str], timeout: float = HANGS_AFTER_S
) -> subprocess.CompletedProcess[str]:
    """Read to the end of a process; the limit is for hangs, and where they stand is told."""
    with process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # faulthandler writes the stack of every thread before it lets the signal kill.
            for pid in [*descendants(process.pid), process.pid]:
                try:
                    os.kill(pid, signal.SIGABRT)
                except ProcessLookupError:
                    continue  # It ended with its parent.
            output, errors = process.communicate()
            raise AssertionError(
                f"{process.args}: hangs, killed after {timeout:.0f} s\n{output}\n{errors}"
            ) from None
        except BaseException:
            for pid in [*descendants(process.pid), process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def state_of(pid: int) -> str:
    """Return the state of a process, as the letter in /proc; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return ""


def descendants(pid: int) -> dict[int, str]:
    """Return the processes that a process started, and theirs, with their names."""
    children: dict[int, list[tuple[int, str]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = path.read_text().partition(" (")
        except OSError:
            continue  # It has ended by now.
        name, _, rest = rest.rpartition(") ")
        if rest[0] != "Z":
            children.setdefault(int(rest.split()[1]), []).append((int(number), name))
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        for child, name in children.get(todo.pop(), []):
            found[child] = name
            todo.append(child)
    return found
