"""A cluster's request to stop: TERM, USR1 or Ctrl+C set a flag that all processes agree on."""

from __future__ import annotations

import signal
from types import FrameType

_received: signal.Signals | None = None


def install() -> None:
    """From now on TERM, USR1 and INT only set a flag; the loop reads it at the end of a step.

    A handler that saved by itself would save on one rank while another waits in a collective.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)


def received() -> str | None:
    """Return the name of the signal that this process received (SIGTERM), or None."""
    return _received.name if _received else None


def reset() -> None:
    """Forget the signal: a dry run goes on after the stop that it rehearsed."""
    global _received
    _received = None
