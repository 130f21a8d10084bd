"""The run's story: the lines that rank 0 prints, as its log has them."""

from __future__ import annotations


def say(text: str) -> None:
    """Print a line of the story at once, whatever becomes of this process."""
    print(text, flush=True)
