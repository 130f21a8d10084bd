"""The user's mistakes on the laptop's side: one line on stderr, exit 2."""

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
    """A parser whose complaints are a `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists the options")


def split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return a command's own words, and those after `--`, which it passes on as they are."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def run_to_exit(main: Callable[[list[str]], int]) -> None:
    """Run a command's `main` and exit with its code; a `UserError` is one line and exit 2."""
    # A locale that lacks a letter must not end a run at the line that has it, at each resume again.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        # Some of its words may be somebody else's: a server's, a file's.
        print("error: " + printable(str(error)), file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # Whoever read the output has left, as `head` does; Python would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_READER_LEFT
    sys.exit(code)
