"""Fifty ends that nobody is prepared for; after each the terminal is as it was."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.ssh.modes import Modes
from tests.cluster.ssh.relay import Relay
from tests.cluster.ssh.screen import CLIENT, Screen, environment
from tests.cluster.ssh.server import NewServer, Server

pytestmark = pytest.mark.needs("sshd")

# Everything that a full-screen program turns on, and then what it does all day.
TURN_ON = r"\033[?1049h\033[?1000h\033[?1006h\033[?2004h\033[?25l\033[>4;2m\033=\033[31m"
BUSY = f"printf '{TURN_ON}on %d\\n' $PPID; while :; do printf '\\033[Hx'; sleep 0.01; done"
AT_ONCE = 5


def run_one(server: Server, kind: str, seed: int) -> None:
    """Start a session, end it by `kind` at some moment, and look at the terminal."""
    dice = random.Random(seed)
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(Relay(server.port))
        alive = ("ConnectTimeout 5", "ServerAliveInterval 2", "ServerAliveCountMax 2")
        variables = environment(server, relay.config(server, *alive))
        screen = stack.enter_context(Screen([*CLIENT, "--command", BUSY], variables))
        before = screen.stty()
        # Every third while it still connects or has just begun.
        serving = None
        # A peer that falls silent during the sign-in is waited for: somebody may be typing a code.
        if early := kind != "cut" and dice.random() < 0.33:
            time.sleep(dice.uniform(0.1, 0.8))
        else:
            serving = int(screen.expect(r"on (\d+)\r")[1])
            time.sleep(dice.uniform(0, 0.3))
        end(screen, relay, kind, serving)
        try:
            code = screen.wait(timeout=40)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {kind}, early {early}: {error}") from None
        # Killed, it is gone before the one who stands in for it has done its work.
        deadline = time.monotonic() + 5
        while (screen.attributes() != screen.at_start or screen.left_on()) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.005)
        told = f"seed {seed}, {kind}, early {early}, code {code}: {screen.shown[-500:]!r}"
        assert screen.stty() == before, told
        assert screen.attributes() == screen.at_start, told
        assert screen.left_on() == b"", told
        if not early:
            expected = {"KILL": -9, "TERM": 143, "HUP": 129, "INT": 130, "QUIT": 131}
            assert code == expected.get(kind, 255), told
            if kind in ("server", "cut", "reset"):
                assert b"the connection was lost: " in screen.shown, told


def end(screen: Screen, relay: Relay, kind: str, serving: int | None) -> None:
    """End the session, or what it needs."""
    if kind == "cut":
        relay.cut()
    elif kind == "reset" or (kind == "server" and serving is None):
        relay.reset()
    elif kind == "server":
        assert serving is not None
        os.kill(serving, signal.SIGKILL)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(screen.process.pid, getattr(signal, f"SIG{kind}"))


def test_fifty_random_kills_leave_the_terminal_as_it_was(new_server: NewServer) -> None:
    server = new_server()
    first = random.randrange(1 << 30)
    kinds = ["KILL", "server", "cut", "KILL", "TERM", "reset", "HUP", "server", "INT", "KILL"] * 5
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ends = [pool.submit(run_one, server, kind, first + n) for n, kind in enumerate(kinds)]
    for ended in ends:
        ended.result()


def test_what_is_turned_on_is_seen_by_the_test() -> None:
    modes = Modes()
    modes.feed(TURN_ON.encode().decode("unicode_escape").encode())
    assert len(modes.undo()) > 30
