"""How a training script exits: a user error is one line, and each outcome has its exit code."""

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
    """A run cannot continue, though its settings are valid: a full disk, a non-finite loss."""


def run_to_exit(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a script's `main` on the command line and exit with its code.

    A `UserError` is one line and exit 2, a `RunFailed` one line and exit 1; anything else is a bug
    and shows its traceback. Nothing is torn down: a process whose peers are gone can hang forever
    in the clean-up of its process group, and the threads of a live group have been seen to abort
    the interpreter's exit, so that a finished run failed.
    """
    # A character that the locale cannot encode must not end the run, and again at each resume.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output is gone, as with `head`.
        os._exit(EXIT_READER_LEFT)
    except KeyboardInterrupt:
        # What was half done, a download for example, was cleaned up on the way here.
        code = 130
    except (UserError, RunFailed) as error:
        # In one write: several ranks may report it at the same time.
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
    """Turn an `OSError` about a file or a disk into one line."""
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
        raise UserError(f"{setting}: no permission for {folder}; choose another place") from None
    if not existing.is_dir():
        raise UserError(f"{setting}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{setting}: {existing} is not writable; choose another place")
