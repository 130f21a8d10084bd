"""How a script of the training side ends: a mistake is one line, and each end has its exit code."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from runfolder.errors import UserError
from runfolder.exit_codes import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_READER_LEFT


class RunFailed(RuntimeError):
    """A run cannot go on, and no setting was wrong: a full disk, a loss that is not finite."""


def run_to_exit(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a script's `main` on the command line and exit with its code.

    A `UserError` is one line and exit 2, a `RunFailed` one line and exit 1; anything else is a bug
    and shows its traceback. Nothing is torn down: a process whose peers are gone can hang for ever
    in the clean-up of its process group, and the threads of a group that is alive have been seen
    to abort the interpreter's exit and so make a finished run a failed one.
    """
    # A locale that lacks a letter must not end a run at the line that has it, at each resume again.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has left, as `head` does.
        os._exit(EXIT_READER_LEFT)
    except (UserError, RunFailed) as error:
        # In one write: several ranks may say it at the same moment.
        sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")
        code = EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILED
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def said_of_the_disk() -> Iterator[None]:
    """Turn what the system says of a file or a disk into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{error.filename}: {reason}" if error.filename else reason) from None


def check_writable_folder(folder: Path, setting: str) -> None:
    """Raise `UserError` if `folder`, or the nearest parent that exists, cannot be written to."""
    existing = folder
    try:
        while not existing.exists():
            existing = existing.parent
    except PermissionError:
        raise UserError(f"{setting}: {folder} is closed to you; choose another place") from None
    if not existing.is_dir():
        raise UserError(f"{setting}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{setting}: {existing} is not writable; choose another place")
