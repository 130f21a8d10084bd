"""Ends that nobody is prepared for, at each moment; after each the terminal is as it was.

tests/drills has more, at moments that chance chooses.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real.cluster.login.relay import Relay
from tests.real.cluster.login.screen import CLIENT, Screen, environment, plain_shell
from tests.real.cluster.login.server import Server
from tests.waiting import wait_until

pytestmark = pytest.mark.needs("sshd")

# Everything that a full-screen program turns on, and then what it does all day.
TURN_ON = r"\033[?1049h\033[?1000h\033[?1006h\033[?2004h\033[?25l\033[>4;2m\033=\033[31m"
# It ends with its terminal, also with one that is gone before it begins.
BUSY = f"printf '{TURN_ON}on %d\\n' $PPID; while printf '\\033[Hx'; do sleep 0.01; done"


def given_back(screen: Screen) -> None:
    """Wait until nobody but the test has the terminal, and check that it is as it was."""
    wait_until(
        lambda: not screen.others(),
        "nothing to be left",
        every_s=0.02,
        so_far=lambda: str(screen.others()),
    )
    assert screen.attributes() == screen.at_start


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_while_it_connects(server: Server, number: int, code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server.write_config(f"Port {silent.getsockname()[1]}")
        with Screen(CLIENT, environment(server)) as screen:
            peer, _ = silent.accept()
            # Its first words; the server's never come.
            assert peer.recv(4) == b"SSH-"
            os.kill(screen.process.pid, number)
            assert screen.wait() == code
            peer.close()
            given_back(screen)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_while_the_terminal_is_raw_and_nothing_was_shown(
    server: Server, number: int, code: int
) -> None:
    with Screen([*CLIENT, "--command", "cat"], environment(server)) as screen:
        wait_until(screen.is_raw, "a raw terminal", every_s=0.01)
        os.kill(screen.process.pid, number)
        assert screen.wait() == code
        given_back(screen)
        assert screen.shown == b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGQUIT, 131), (signal.SIGHUP, 129)])
def test_at_the_prompt(server: Server, number: int, code: int) -> None:
    with Screen(CLIENT, environment(server)) as screen:
        plain_shell(screen, server)
        os.kill(screen.process.pid, number)
        assert screen.wait() == code
        given_back(screen)


LOST = b"server: the connection was lost: "


def kill(number: int) -> Callable[[Screen, Relay, int], None]:
    return lambda screen, relay, serving: os.kill(screen.process.pid, number)


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        pytest.param(kill(signal.SIGTERM), 143, b"", id="TERM"),
        pytest.param(kill(signal.SIGINT), 130, b"", id="INT"),
        pytest.param(kill(signal.SIGQUIT), 131, b"", id="QUIT"),
        pytest.param(
            lambda screen, relay, serving: os.kill(serving, signal.SIGKILL),
            255,
            LOST + b"server closed the connection",
            id="server",
        ),
        pytest.param(lambda screen, relay, serving: relay.reset(), 255, LOST, id="reset"),
    ],
)
def test_while_output_flows(
    server: Server, end: Callable[[Screen, Relay, int], None], code: int, said: bytes
) -> None:
    with Relay(server.port) as relay:
        end_while_output_flows(server, relay, relay.config(server), end, code, said)


def test_a_network_that_is_cut_while_output_flows(server: Server) -> None:
    with Relay(server.port) as relay:
        config = relay.config(server, "ServerAliveInterval 1", "ServerAliveCountMax 5")
        said = LOST + b"no answer from server for "
        end_while_output_flows(server, relay, config, lambda *_: relay.cut(), 255, said)


def end_while_output_flows(
    server: Server,
    relay: Relay,
    config: Path,
    end: Callable[[Screen, Relay, int], None],
    code: int,
    said: bytes,
) -> None:
    """End a session of a full-screen program; check its exit code, its words and the terminal."""
    with Screen([*CLIENT, "--command", BUSY], environment(server, config)) as screen:
        before = screen.stty()
        serving = int(screen.expect(r"on (\d+)\r")[1])
        # It draws.
        screen.expect(rb"\x1b\[Hx")
        end(screen, relay, serving)
        assert screen.wait() == code
        given_back(screen)
        assert screen.stty() == before
        assert said in screen.shown
