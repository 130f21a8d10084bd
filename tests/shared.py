"""What the workers of one run share: a folder, things made once, ports given to one test only."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

CHECKOUT = Path(__file__).resolve().parents[1]
# The variable that names the folder; tests/conftest.py sets it before the workers start.
SHARED = "SLUICE_TESTS_SHARED"
# Below the range from which the kernel takes ports for outgoing connections, and that from which
# `make run` takes one at random (cluster/plan/machine.py), to be listened on seconds later.
FIRST_PORT, LAST_PORT = 10_000, 20_000


def shared() -> Path:
    """Return the folder of what all workers share."""
    return Path(os.environ[SHARED])


def once(name: str, make: Callable[[], str]) -> str:
    """Return what `make` returned in the first worker that asked; the others wait for it.

    What failed there fails for all, at once.
    """
    with FileLock(shared() / f"{name}.lock"):
        made, failed = shared() / f"{name}.made", shared() / f"{name}.failed"
        if failed.exists():
            raise AssertionError(f"{name}, in another test: {failed.read_text()}")
        if not made.exists():
            try:
                made.write_text(make())
            except BaseException as error:
                failed.write_text(str(error) or type(error).__name__)
                raise
        return made.read_text()


def free_port() -> int:
    """Return a port that no other test of this run is given and nobody listens on."""
    with FileLock(shared() / "port.lock"):
        last = shared() / "port"
        # Another run on this machine begins elsewhere.
        span = LAST_PORT - FIRST_PORT
        port = int(last.read_text()) if last.exists() else FIRST_PORT + os.getppid() * 37 % span
        for _ in range(span):
            port = FIRST_PORT + (port + 1 - FIRST_PORT) % span
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) != 0:
                    last.write_text(str(port))
                    return port
    raise AssertionError("no free port")


def at_end(*command: str | Path, environment: Mapping[str, str] | None = None) -> None:
    """Have a command run when all workers are done, the last that was named first."""
    line = json.dumps([[str(word) for word in command], dict(environment or os.environ)])
    with FileLock(shared() / "at_end.lock"), (shared() / "at_end").open("a") as stream:
        stream.write(line + "\n")


def clean_up() -> None:
    """Run what was left for the end, and delete the folder of what was shared."""
    folder = Path(os.environ.pop(SHARED))
    lines = (folder / "at_end").read_text().splitlines() if (folder / "at_end").exists() else []
    for command, environment in map(json.loads, reversed(lines)):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(f"error: {' '.join(command)}: {done.stderr or done.stdout}")
    shutil.rmtree(folder)
