"""cluster/login/remote.py: a link that breaks ends the session, and raises nothing into it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import paramiko
import pytest

from cluster.login import remote
from cluster.login.config import Host
from cluster.login.connection import Connection, Hop
from cluster.login.link import Link
from cluster.login.outlet import Outlet
from cluster.login.remote import Remote
from tests.waiting import wait_until

HOST_KEY = paramiko.ECDSAKey.generate()


class Server(paramiko.ServerInterface):
    """Lets in whoever comes."""

    def check_auth_none(self, username: str) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED


@dataclass
class Pair:
    """A session, and the link that it is in."""

    link: Link
    remote: Remote

    def wait(self) -> None:
        """Wait until the session is over."""
        wait_until(lambda: self.remote.is_over, "the end of the session", every_s=0.01)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(remote, "LAST_WORDS_S", 0.05)
    ours, theirs = socket.socketpair()
    server = paramiko.Transport(theirs)
    server.add_server_key(HOST_KEY)
    server.start_server(threading.Event(), Server())
    link = Link(ours, {}, is_compressed=False)
    link.offer_host_keys([HOST_KEY.get_name()])
    link.start_client()
    link.auth_none("me")
    null = os.open(os.devnull, os.O_WRONLY)
    outlet = Outlet(null)
    yield Pair(link, Remote(link.open_session(), outlet, outlet, lambda: None))
    link.close()
    server.close()
    outlet.close()
    os.close(null)


def test_keys_typed_when_the_link_has_just_closed_are_no_error(pair: Pair) -> None:
    pair.link.close()
    pair.remote.send(b"x")
    assert pair.remote.is_over


def fail(*_: object) -> None:
    raise EOFError


def test_a_key_that_cannot_be_sent_ends_the_session(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair.link.packetizer, "write_all", fail)
    pair.remote.send(b"x")
    pair.wait()


def test_a_stall_in_the_midst_of_new_keys_ends_the_session(pair: Pair) -> None:
    pair.link.clear_to_send_timeout = 0.1
    pair.link.clear_to_send.clear()
    pair.remote.send(b"x")
    pair.wait()
    # The thread that reads finds it closed, and that is not what the user is told.
    pair.link.join()
    hop = Hop(host=Host(alias="farm", hostname="farm", user="me"), link=pair.link, proxy=None)
    assert "farm closed the connection: Key-exchange timed out" in str(Connection([hop]).lost)
    assert not pair.remote.was_closed
