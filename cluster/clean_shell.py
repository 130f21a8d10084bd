"""A clean shell on the login node, in which our scripts run, whatever the login files do.

A login shell is needed for what sites set up in one (Slurm on the PATH, modules), but our scripts
do not run in it: it may exit, print, hang, or have been replaced by another shell, and it runs
~/.bash_logout when it exits. So a first, clean bash starts a login shell beside itself, copies its
environment, umask and limits, and becomes a second clean bash, which runs the script with the
session's own streams.
"""

from __future__ import annotations

import base64
import contextlib
import re
import secrets
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runfolder.errors import UserError, printable

# When to say that the login files have not finished, and when to give up on them.
SLOW_S = 10.0
LIMIT_S = 120.0
# How long to wait for a failed script's messages; another process may hold its stderr open.
LAST_WORDS_S = 2.0
BLOCK_BYTES = 1 << 16
# Prefixes of the first shell's errors and notes, which are shown as they are.
ERROR, NOTE = "error: ", "note: "

# The first shell; the script lists the variables to set before it.
TAKE_OVER = Path(__file__).with_name("clean_shell.sh")


def command(
    script: str,
    modules: Sequence[str] = (),
    *,
    slow_s: float = SLOW_S,
    limit_s: float = LIMIT_S,
) -> str:
    """Return a command for any login shell, including csh and fish, that runs a bash script.

    The script runs in the home folder, with the environment of a login in which `modules` are
    loaded. What the login files print goes to stderr, and they do not get the script's input.
    """
    loads = [
        f"module load {shlex.quote(name)} >&2 || "
        rf"{{ \builtin printf 'module %s\0' {shlex.quote(name)} >&61; \builtin exec true; }}"
        for name in modules
    ]
    values = {
        "script": script,
        "modules": "\n".join(loads),
        "slow": f"{slow_s:g}",
        "limit": f"{limit_s:g}",
    }
    first = "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
    first += TAKE_OVER.read_text(encoding="utf-8")
    packed = base64.b64encode(first.encode()).decode()
    # Between single quotes, and without characters that are special to any shell there.
    words = "exec bash --noprofile --norc -p -c"
    return f"{words} 'eval \"$(echo {packed} | base64 -d)\"'"


@dataclass(kw_only=True)
class Answer:
    """A script's output, between marks that nothing else can have printed."""

    script: str
    """The script, with the marks."""
    code: int | None = None
    """The script's exit code, once its answer is complete."""
    _begin: bytes
    _end: re.Pattern[bytes]
    _output: bytearray = field(default_factory=bytearray)
    _errors: bytearray = field(default_factory=bytearray)

    @classmethod
    def of(cls, script: str) -> Answer:
        """Return the answer of a bash script that is yet to run."""
        mark = f"-- sluice {secrets.token_hex(8)} --"
        # In a subshell: however the script ends, its exit code is printed.
        marked = f"printf '\\n{mark}\\n'\n(\n{script}\n)\ncode=$?\nprintf '\\n{mark} %s\\n' $code\n"
        return cls(
            script=f"{marked}exit $code",
            _begin=f"\n{mark}\n".encode(),
            _end=re.compile(rf"\n{mark} (\d+)\n".encode()),
        )

    def take(self, output: bytes) -> bool:
        """Take some output; return whether the answer is complete."""
        # The mark may have arrived in pieces.
        searched = max(0, len(self._output) - 64)
        self._output += output
        if ended := self._end.search(self._output, searched):
            self.code = int(ended[1])
        return self.code is not None

    def take_error(self, errors: bytes) -> list[str]:
        """Take some of stderr; return the lines to show at once."""
        lines = (bytes(self._errors).rpartition(b"\n")[2] + errors).split(b"\n")[:-1]
        self._errors += errors
        shown = [printable(line.decode(errors="replace")) for line in lines]
        return [line for line in shown if line.startswith(NOTE)]

    def collect(
        self,
        send: Callable[[], None],
        read: Callable[[int], bytes],
        read_error: Callable[[int], bytes],
    ) -> None:
        """Take the answer from a session's streams, while its input is sent.

        It may be complete before the streams end: a login file may have left something running.
        """

        def take_errors() -> None:
            with contextlib.suppress(OSError, ValueError):  # closed, as the answer is complete
                while errors := read_error(BLOCK_BYTES):
                    for line in self.take_error(errors):
                        print(line, file=sys.stderr, flush=True)

        # All three at once: each may block another.
        threads = [threading.Thread(target=job, daemon=True) for job in (send, take_errors)]
        for thread in threads:
            thread.start()
        while (output := read(BLOCK_BYTES)) and not self.take(output):
            continue
        if self.code != 0:
            threads[1].join(LAST_WORDS_S)

    def words(self, host: str, exit_code: int) -> bytes:
        """Return the script's output.

        Args:
            host: the name that was asked for.
            exit_code: of the session, used where the script's own is unknown.

        Raises:
            UserError: the script failed, or never ran.
        """
        before, found, rest = bytes(self._output).partition(self._begin)
        ended = self._end.search(rest)
        if found and ended and int(ended[1]) == 0:
            return rest[: ended.start()]
        lines = [line.strip() for line in self._errors.decode(errors="replace").splitlines()]
        said = [line for line in lines if line and not line.startswith(NOTE)]
        if not found and said and said[-1].startswith(ERROR):
            raise UserError(f"{host}: {printable(said[-1].removeprefix(ERROR))}")
        if found:
            code = int(ended[1]) if ended else exit_code
            last = said[-1] if said else f"exit code {code}"
            raise UserError(f"{host}: a command failed there: {printable(last)}")
        said += [
            line.strip() for line in before.decode(errors="replace").splitlines() if line.strip()
        ]
        last = said[-1] if said else f"exit code {exit_code}"
        raise UserError(
            f"{host}: bash could not be started there: {printable(last)}; the login shell, or "
            "one of its startup files (such as ~/.bashrc), exited first: try ssh, or ask the site"
        )
