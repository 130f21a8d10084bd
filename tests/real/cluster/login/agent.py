"""An ssh-agent of a test's own."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.waiting import wait_until


@dataclass(frozen=True)
class Agent:
    """An ssh-agent that runs; a context manager that ends it."""

    socket: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, folder: Path, *options: str) -> Self:
        """Start one without keys; what it says, goes to the file `agent.log`."""
        command = ["ssh-agent", *(options or ["-D"]), "-a", str(folder / "agent")]
        with (folder / "agent.log").open("wb") as log:
            made = cls(folder / "agent", subprocess.Popen(command, stdout=log, stderr=log))

        def listens() -> bool:
            assert made.process.poll() is None
            return made.socket.exists()

        wait_until(listens, "the agent to listen", every_s=0.01)
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def add(self, key: Path, *options: str) -> None:
        """Have it hold a key."""
        subprocess.run(
            ["ssh-add", "-q", *options, key],
            env=os.environ | {"SSH_AUTH_SOCK": str(self.socket)},
            check=True,
            capture_output=True,
        )
