"""The lines that rank 0 prints, as they are in the run's log."""

from __future__ import annotations


def say(text: str) -> None:
    """Print a line and flush it, so that it is kept whatever happens to this process."""
    print(text, flush=True)
