"""Fifty ends that nobody is prepared for, at random; after each the terminal is as it was."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.real.cluster.login.relay import Relay
from tests.real.cluster.login.screen import CLIENT, Screen, environment
from tests.real.cluster.login.server import Server, start
from tests.real.cluster.login.test_kills import BUSY, LOST, given_back

pytestmark = pytest.mark.needs("sshd")

KINDS = ["QUIT", "server", "cut", "TERM", "TERM", "reset", "HUP", "server", "INT", "cut"] * 5
CODES = {"TERM": 143, "HUP": 129, "INT": 130, "QUIT": 131}
AT_ONCE = 5


def run_one(server: Server, kind: str, dice: random.Random) -> None:
    """Start a session, end it by `kind` at some moment, and look at the terminal."""
    with Relay(server.port) as relay:
        alive = ("ConnectTimeout 5", "ServerAliveInterval 2", "ServerAliveCountMax 2")
        variables = environment(server, relay.config(server, *alive))
        with Screen([*CLIENT, "--command", BUSY], variables) as screen:
            before = screen.stty()
            # Every third while it still connects or has just begun.
            serving = None
            # A peer that falls silent during the sign-in is waited for: somebody may be typing.
            if early := kind != "cut" and dice.random() < 0.33:
                time.sleep(dice.uniform(0.1, 0.8))
            else:
                serving = int(screen.expect(r"on (\d+)\r")[1])
                time.sleep(dice.uniform(0, 0.3))
            end(screen, relay, kind, serving)
            code = screen.wait()
            given_back(screen)
            assert screen.stty() == before
            if not early:
                assert code == CODES.get(kind, 255)
                assert (LOST in screen.shown) == (kind not in CODES)


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


def test_fifty_random_kills_leave_the_terminal_as_it_was(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    seed = request.config.getoption("seed")
    if seed is None:
        seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    server = start(tmp_path / "sshd")
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            ends = [
                pool.submit(run_one, server, kind, random.Random(seed + number))
                for number, kind in enumerate(KINDS)
            ]
        failures = [
            f"{kind}, seed {seed + number}: {error}"
            for number, (kind, ended) in enumerate(zip(KINDS, ends, strict=True))
            if (error := ended.exception()) is not None
        ]
        assert not failures, "\n".join(failures)
    finally:
        server.stop()
