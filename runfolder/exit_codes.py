"""The exit codes by which a run tells its caller how it ended."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
"""What was asked for cannot run, and would not the next time: no attempt follows it."""
EXIT_SAVED = 75
"""EX_TEMPFAIL of sysexits.h: saved before the end, run me again."""
EXIT_READER_LEFT = 141
"""What a shell says of a process that SIGPIPE ended."""


def of_outcome(word: str) -> int:
    """Return the exit code of an attempt that ended so (`attempts.OUTCOMES`)."""
    return {"finished": 0, "stopped": EXIT_SAVED}.get(word, EXIT_FAILED)
