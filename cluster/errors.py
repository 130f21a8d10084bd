"""User errors of the commands: one line on stderr, exit code 2."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from runfolder.errors import UserError, printable
from runfolder.exit_codes import EXIT_BAD_INPUT, EXIT_READER_LEFT


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists the options")


def split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return a command's own arguments, and those after `--`, which it passes on unchanged."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def run_to_exit(main: Callable[[list[str]], int]) -> None:
    """Run a command's `main` and exit with its code; a `UserError` is one line and exit 2."""
    # A character that the locale lacks must not end a run, and again at each resume.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        # Parts of the message may come from elsewhere, such as a server or a file.
        print("error: " + printable(str(error)), file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader of the output is gone, as with `head`; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_READER_LEFT
    sys.exit(code)
