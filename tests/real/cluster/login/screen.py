"""A terminal that a test types into and reads: a pseudo-terminal with a real program in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.real.cluster.login.server import Server
from tests.shared import CHECKOUT
from tests.waiting import wait_until

# How often to look what a process does while it shows nothing.
LOOK_S = 0.2
END_LOOK_S = 0.02
CLIENT = (sys.executable, "-m", "cluster", "ssh")


def environment(server: Server, config: Path | None = None, **variables: str) -> dict[str, str]:
    """Return a user's environment in which the site's login node is the test's server."""
    config = config or server.config
    site = config.with_name(f"{config.name}.toml")
    example = (CHECKOUT / "configs/site.example.toml").read_text()
    named = f'\n[ssh]\nhost = "server"\nconfig = "{config}"\n'
    site.write_text(example.replace("\n[ssh]\n", named, 1))
    # Else a shell's prompt turns a mode on and off, in the midst of what is expected.
    (server.folder / "inputrc").write_text("set enable-bracketed-paste off\n")
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "USER", "TMPDIR") if key in os.environ}
    ours = {
        "SLUICE_SITE": str(site),
        "TERM": "xterm-256color",
        "PS1": "local$ ",
        "HISTFILE": "",
        "INPUTRC": str(server.folder / "inputrc"),
    }
    return kept | ours | variables


class Screen:
    """A program in a terminal of its own, as its session's leader; a context manager ends it."""

    def __init__(
        self,
        command: Sequence[str | Path],
        variables: Mapping[str, str],
        *,
        columns: int = 80,
        rows: int = 24,
    ) -> None:
        self._master, self._slave = os.openpty()
        self.resize(columns, rows)
        os.set_blocking(self._master, False)
        self.at_start = self.attributes()
        # It is the leader of its session already: it becomes so in place.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            cwd=CHECKOUT,
            env=dict(variables),
        )
        self.shown = b""
        """All that it has written."""
        self._looked = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    def attributes(self) -> list[Any]:
        """Return what `stty -a` shows."""
        return termios.tcgetattr(self._slave)

    def stty(self) -> str:
        """Return what `stty -a` shows, for a look by the real one."""
        done = subprocess.run(
            ["stty", "-a"], stdin=self._slave, check=True, capture_output=True, text=True
        )
        return done.stdout

    def resize(self, columns: int, rows: int) -> None:
        """Make the window larger or smaller."""
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str | bytes) -> None:
        """Press keys."""
        data = text.encode() if isinstance(text, str) else text

        def is_typed() -> bool:
            nonlocal data
            try:
                data = data[os.write(self._master, data) :]
            except BlockingIOError:
                self.read()
                select.select([self._master], [self._master], [], LOOK_S)
            return not data

        self._until(is_typed, "room for what is typed")

    def read(self) -> None:
        """Take in what it has written by now, or some of it where it goes on without an end."""
        try:
            for _ in range(100):
                if not (data := os.read(self._master, 1 << 16)):
                    return
                self.shown += data
        except OSError:
            return

    def expect(self, pattern: str | bytes) -> re.Match[bytes]:
        """Wait until it shows `pattern`, after what was expected before."""
        expression = re.compile(pattern.encode() if isinstance(pattern, str) else pattern)
        found: list[re.Match[bytes]] = []

        def shows() -> bool:
            if has_ended := self.process.poll() is not None:
                self._read_last()
            else:
                self.read()
            found.extend(expression.finditer(self.shown, self._looked))
            assert found or not has_ended, (
                f"it ended with {self.process.returncode}, without {pattern!r}: {self.shown!r}"
            )
            if not found:
                self._wait()
            return bool(found)

        self._until(shows, f"{pattern!r}")
        self._looked = found[0].end()
        return found[0]

    def is_raw(self) -> bool:
        """Whether keys go to the program as they are."""
        return not self.attributes()[3] & termios.ICANON

    def is_full(self) -> bool:
        """Whether it takes nothing more of what is written, until somebody reads."""
        return not select.select([], [self._slave], [], 0)[1]

    def wait(self) -> int:
        """Wait until it has ended, while it may still write; return its exit code."""

        def has_ended() -> bool:
            self.read()
            if self.process.poll() is None:
                self._wait(END_LOOK_S)
            return self.process.poll() is not None

        self._until(has_ended, "its end")
        self._read_last()
        return self.process.returncode

    def _until(self, happened: Callable[[], bool], what: str) -> None:
        # `happened` waits itself, for what is shown.
        wait_until(happened, what, every_s=0, so_far=lambda: f"it shows {self.shown[-2000:]!r}")

    def others(self) -> dict[int, str]:
        """Return the processes that have the terminal open, but ours, with their command lines."""
        name = os.ttyname(self._slave)
        found = {}
        for folder in Path("/proc").glob("[0-9]*/fd"):
            pid = int(folder.parent.name)
            with contextlib.suppress(OSError):  # it has ended by now
                if pid != os.getpid() and any(
                    str(fd.readlink()) == name for fd in folder.iterdir()
                ):
                    found[pid] = (folder.parent / "cmdline").read_bytes().decode(errors="replace")
        return found

    def _read_last(self) -> None:
        """Take in all that was written: the kernel hands it over a moment later, but in order."""
        mark = b"\0the last\0"
        self.read()
        os.write(self._slave, mark)

        def has_come() -> bool:
            self.read()
            if mark not in self.shown:
                self._wait()
            return mark in self.shown

        self._until(has_come, "the last of what was written")
        self.shown = self.shown.replace(mark, b"")

    def _wait(self, seconds: float = LOOK_S) -> None:
        """Wait until it shows something, or it is time to look whether it has ended."""
        select.select([self._master], [], [], seconds)


def session(server: Server, *options: str, config: Path | None = None, **variables: str) -> Screen:
    """Return the real client in a terminal, at a prompt of the far side's shell.

    Without options it is a plain shell there, whose prompt is `there> `.
    """
    screen = Screen([*CLIENT, *options], environment(server, config, **variables))
    if not options:
        plain_shell(screen, server)
    return screen


def plain_shell(screen: Screen, server: Server) -> None:
    """Replace the login shell on the far side by one whose prompt is `there> `."""
    variables = f"TERM=$TERM PATH=$PATH INPUTRC={server.folder}/inputrc PS1='the''re> '"
    screen.type(f"exec env -i {variables} bash --norc --noprofile\r")
    screen.expect("there> ")
