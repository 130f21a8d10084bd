"""The exit codes that tell a run's caller how it ended."""

from __future__ import annotations

import sys

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
"""The request cannot run, and would fail again: it is not retried."""
EXIT_SAVED = 75
"""EX_TEMPFAIL of sysexits.h: saved before the end, run me again."""
EXIT_READER_LEFT = 141
"""What a shell reports for a process that SIGPIPE ended."""


def of_outcome(word: str) -> int:
    """Return the exit code for an outcome (one of `attempts.OUTCOMES`)."""
    return {"finished": 0, "stopped": EXIT_SAVED}.get(word, EXIT_FAILED)


def of_system_exit(code: object) -> int:
    """Return what `sys.exit(code)` ends with; as Python does, print a text, which means 1."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    print(code, file=sys.stderr)
    return EXIT_FAILED
