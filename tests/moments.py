"""A named point of the product at which a process stops, to be killed, signalled or let go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from runfolder import moments
from tests.waiting import wait_until


class Pause:
    """The `time`-th time that a process comes to a moment; to be made before it starts.

        pause = Pause(tmp_path, "before-rename")
        with Ranks(..., environment=clean_environment | pause.variable) as ranks:
            os.kill(pause.wait(ranks.are_alive), signal.SIGKILL)

    The process finds `folder` under the same path, and may write there.
    """

    def __init__(self, folder: Path, moment: str, time: int = 1) -> None:
        # A test that waits for what never comes fails here.
        assert moment in moments.MOMENTS, f"{moment} is none of {', '.join(moments.MOMENTS)}"
        self.path = folder / f"{moment}@{time}"

    @property
    def variable(self) -> dict[str, str]:
        """What the process has to find in its environment."""
        return {moments.VARIABLE: str(self.path)}

    def wait(self, may_come: Callable[[], bool] = lambda: True) -> int:
        """Wait until a process has stopped there, and return its PID; `may_come`: none has ended.

        The PID is that of the process's own namespace.
        """
        wait_until(
            lambda: self.path.exists() or not may_come(),
            f"no process came to {self.path.name}",
            every_s=0.01,
        )
        assert self.path.exists(), f"it ended before it came to {self.path.name}"
        pid = int(self.path.read_text())
        wait_until(lambda: is_stopped(pid), f"process {pid} did not stop", every_s=0.01)
        return pid

    def go_on(self) -> None:
        """Let the process that stopped go on."""
        os.kill(int(self.path.read_text()), signal.SIGCONT)


def is_stopped(pid: int) -> bool:
    """Return whether every thread of a process has stopped."""
    states = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            states.append(stat.read_text().rpartition(") ")[2][0])
        except OSError:
            return False  # This one has just ended, so that others may still do something.
    return bool(states) and set(states) <= {"T", "t"}
