"""The processes of our own scripts, forked by a launcher that has imported what they import.

To import torch and transformers takes longer than a rehearsal trains. Forked, all processes of a
node have it done once, by their launcher.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from runfolder.exit_codes import EXIT_FAILED, of_system_exit

# What takes our scripts long to import.
PRELOADED = ["transformers.modeling_utils", "torch.nn.attention.varlen"]
LOOK_S = 0.05


def fork_from_now_on() -> None:
    """Import what our scripts import, and have the launcher fork its processes."""
    uses_deepspeed = os.environ.get("SLUICE_ACCEL", "").startswith("zero")
    # As in train/engine/script.py: what they create stays.
    gc.disable()
    for name in [*PRELOADED, *(["deepspeed"] if uses_deepspeed else [])]:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    # torch has no public way: its own start method is for functions, which have no exit code.
    SubprocessHandler._popen = _fork  # type: ignore[assignment, method-assign]


def _fork(_: SubprocessHandler, command: tuple[str, ...], environment: dict[str, str]) -> Any:
    return Forked(command, environment)


class Forked:
    """A process that runs a module; the launcher uses it as it uses a Popen."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start it; `command`: python -u -m MODULE WORD..."""
        self.returncode: int | None = None
        self._command = command
        is_ready, tell = os.pipe()
        # The launcher's handlers are not the new process's, not for a moment.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.pid = os.fork()
        if self.pid == 0:
            _become(list(command[command.index("-m") + 1 :]), environment, mask)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # It is signalled by its session, which it has from then on.
        os.close(tell)
        os.read(is_ready, 1)
        os.close(is_ready)

    def poll(self) -> int | None:
        """Return its exit code, or the negative number of a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for its end, and return what `poll` does.

        Raises:
            subprocess.TimeoutExpired: it runs after `timeout` seconds.
        """
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= until:
                raise subprocess.TimeoutExpired(self._command, timeout)
            time.sleep(LOOK_S)
        return code


def _become(words: list[str], environment: dict[str, str], mask: Iterable[int]) -> NoReturn:
    """Make a process that was just forked one as if it had been started, and run its module."""
    code = EXIT_FAILED
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _close_what_is_the_launchers()
        # `ps` and `top` show the launcher's command; the name tells them apart.
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text(f"rank {environment['RANK']}")
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = of_system_exit(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def _close_what_is_the_launchers() -> None:
    """Close what a program that is started does not get: the sockets of the launcher's store."""
    for number in [int(file.name) for file in Path("/proc/self/fd").iterdir()]:
        # One of them was this list's own.
        with contextlib.suppress(OSError):
            if fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                os.close(number)
