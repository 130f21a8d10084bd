"""A request to stop: TERM, USR1, Ctrl+C or a closed terminal set a flag that all ranks agree on."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1  # of linux/prctl.h

_received: list[signal.Signals] = []


def install_first() -> None:
    """From now on USR1 only sets the flag; for the start of a script, before it loads torch.

    A cluster sends it however far the script is. The other signals still end it at once; of a
    launcher's process also Ctrl+C, without the traceback of an import.
    """
    signal.signal(signal.SIGUSR1, _remember)
    if "RANK" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def install() -> None:
    """From now on TERM, USR1, INT and HUP only set a flag; the loop reads it at the end of a step.

    A handler that saved by itself would save on one rank while another waits in a collective.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _remember)


def die_with_launcher() -> None:
    """From now on, be killed when the launcher dies (Linux only).

    The launcher starts each process in its own session. A process that outlives a killed launcher
    would keep training unseen, and hold its GPU and the run folder.
    """
    if sys.platform == "linux" and "RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number))


def received() -> str | None:
    """Return the name of the first signal that this process received (SIGTERM), or None."""
    return _received[0].name if _received else None


def rehearse() -> None:
    """Send this process the signal that a cluster would."""
    os.kill(os.getpid(), signal.SIGUSR1)


def forget_rehearsal() -> None:
    """Continue after a rehearsed stop, unless a real request has come in the meantime."""
    if signal.SIGUSR1 in _received:
        _received.remove(signal.SIGUSR1)
