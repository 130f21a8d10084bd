"""A terminal that a test types into and reads: a pseudo-terminal with a real program in it."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from cluster.ssh.modes import Modes
from tests.cluster.ssh.server import Server
from tests.conftest import CHECKOUT

# A Python that starts on a busy machine, and a shell on the far side.
TIMEOUT_S = 20.0
CLIENT = (sys.executable, "-m", "cluster.ssh")


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
        while data:
            self._wait(writing=True)
            data = data[os.write(self._master, data) :]

    def read(self) -> None:
        """Take in what it has written by now, or some of it where it goes on without an end."""
        try:
            for _ in range(100):
                if not (data := os.read(self._master, 1 << 16)):
                    return
                self.shown += data
        except OSError:
            return

    def expect(self, pattern: str | bytes, timeout: float = TIMEOUT_S) -> re.Match[bytes]:
        """Wait until it shows `pattern`, after what was expected before."""
        expression = re.compile(pattern.encode() if isinstance(pattern, str) else pattern)
        deadline = time.monotonic() + timeout
        while True:
            if has_ended := self.process.poll() is not None:
                self._read_last()
            else:
                self.read()
            if found := expression.search(self.shown, self._looked):
                self._looked = found.end()
                return found
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} is not in {self.shown[self._looked :][-2000:]!r}"
            assert not has_ended, (
                f"it ended with {self.process.returncode}, without {pattern!r}: {self.shown!r}"
            )
            self._wait(left=min(left, 0.2))

    def is_raw(self) -> bool:
        """Whether keys go to the program as they are."""
        return not self.attributes()[3] & termios.ICANON

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        """Wait until it has ended, while it may still write; return its exit code."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it goes on; it shows {self.shown[-2000:]!r}"
            self._wait(left=0.02)
            self.read()
        self._read_last()
        return self.process.returncode

    def left_on(self) -> bytes:
        """Return what would have to be sent to turn off what was turned on."""
        self.read()
        modes = Modes()
        modes.rows = os.get_terminal_size(self._slave).lines
        modes.feed(self.shown)
        return modes.undo()

    def _read_last(self) -> None:
        """Take in all that was written: the kernel hands it over a moment later, but in order."""
        mark = b"\0the last\0"
        self.read()
        os.write(self._slave, mark)
        deadline = time.monotonic() + TIMEOUT_S
        while mark not in self.shown:
            assert time.monotonic() < deadline, "the terminal stands still"
            self._wait(left=0.1)
            self.read()
        self.shown = self.shown.replace(mark, b"")

    def _wait(self, *, left: float = 1.0, writing: bool = False) -> bool:
        ready = select.select([self._master], [self._master] if writing else [], [], left)
        return any(ready)


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
