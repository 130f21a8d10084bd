"""What the tests of cluster/login share: real sshd on loopback, with keys of its own, an agent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.cluster.login.agent import Agent
from tests.real.cluster.login.server import NewServer, Server, start


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[NewServer]:
    """Return a function that starts an sshd for this test, with lines of its own in its config."""
    servers: list[Server] = []

    def make(*lines: str, **options: object) -> Server:
        folder = tmp_path / f"sshd-{len(servers)}"
        servers.append(start(folder, *lines, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = start(tmp_path_factory.mktemp("sshd"))
    yield made
    made.stop()


@pytest.fixture
def server(one_server: Server) -> Server:
    """Return an sshd that lets us in by key, for all tests that change nothing of it.

    `ssh -F SERVER.config server` is the way in; `resolve("server", config=str(server.config))`.
    """
    # Another test may have written one of its own.
    one_server.write_config()
    return one_server


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    """Return an ssh-agent without keys."""
    with Agent.start(tmp_path) as made:
        yield made
