"""runfolder/ports.py: a port at which nobody listens, on every address that is asked for."""

from __future__ import annotations

import socket

import pytest

from runfolder import ports
from runfolder.errors import UserError
from tests.shared import free_port


def test_a_port_that_somebody_listens_on_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        busy = taken.getsockname()[1]
        free = free_port()
        monkeypatch.setattr(ports, "PORTS", [busy, busy, free, busy])
        addresses = ("127.0.0.1", "127.0.0.2")
        assert [ports.free_port(addresses, first=first) for first in (0, 1, 2, 3, 6)] == [free] * 5
        assert ports.free_port(addresses) == free
        assert ports.free_port(first=1) == busy, "it is free on the only address that was asked for"
        monkeypatch.setattr(ports, "MOST_TRIES", 2)
        with pytest.raises(UserError, match=r"^2 ports in a row are taken on this machine"):
            ports.free_port(addresses, first=3)


def test_the_same_number_gives_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_is_taken", lambda address, port: False)
    assert ports.free_port(first=12 * 13) == 20_156
    assert ports.free_port(first=12 * 13 + 10_000) == 20_156
