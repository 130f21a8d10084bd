"""Ways to a server: addresses, jumps, ProxyCommand; and how a connection ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.login import connection as connection_module
from cluster.login.config import Host, resolve
from cluster.login.connection import connect, route
from cluster.login.watchdog import Watchdog
from runfolder.errors import UserError
from tests.real.cluster.login.answers import answers, host_of, output, signed_in
from tests.real.cluster.login.server import USER, NewServer, Server
from tests.waiting import HANGS_AFTER_S, wait_until

pytestmark = pytest.mark.needs("sshd")


def refusal(host: Host) -> str:
    user = answers()
    with pytest.raises(UserError) as caught:
        connect(host, prompts=user, say=user.say)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def children() -> set[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return {int(word) for word in path.read_text().split()}


def chain(tmp_path: Path, **servers: Server) -> Path:
    """Write one ssh_config with several servers."""
    path = tmp_path / "ssh_config"
    texts = [server.write_config(name=name).read_text() for name, server in servers.items()]
    path.write_text("".join(texts))
    return path


# ---- the way ----


def test_all_addresses_are_tried_and_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.write_config("Compression yes")
    host = host_of(server)
    real = socket.getaddrinfo("127.0.0.1", host.port, 0, socket.SOCK_STREAM)
    closed = socket.getaddrinfo("127.0.0.2", host.port, 0, socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: closed + real)
    with signed_in(host) as connection:
        assert output(connection, "echo compressed") == "compressed\n"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: closed + closed)
    said = refusal(host)
    assert said.count(f"127.0.0.2 port {host.port}: Connection refused") == 2


def test_a_name_without_an_address_is_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    server.write_config("HostName no-such-host.invalid")
    assert "could not resolve hostname no-such-host.invalid" in refusal(host_of(server))


def test_two_jumps_each_with_its_own_sign_in(new_server: NewServer, tmp_path: Path) -> None:
    first, second, last = new_server(), new_server(), new_server()
    config = chain(tmp_path, first=first, second=second, last=last)
    host = replace(resolve("last", config=str(config)), proxy_jump=("first", f"{USER}@second"))
    with signed_in(host) as connection:
        assert connection.host.alias == "last"
        # The last sees the second as its client; and each was signed in to once.
        assert output(connection, "id -un") == f"{USER}\n"
        for server in (first, second, last):
            assert server.log.count("Accepted publickey") == 1
        assert "direct-tcpip" in first.log and "direct-tcpip" in second.log
    # Each hop's host key is checked.
    second.known_hosts.write_text(
        last.known_hosts.read_text().replace(str(last.port), str(second.port))
    )
    assert f"{second.known_hosts}:1" in refusal(host)
    assert last.log.count("Accepted publickey") == 1


def test_the_jumps_of_a_jump_and_their_end(tmp_path: Path) -> None:
    config = tmp_path / "ssh_config"
    config.write_text(
        "Host a\n ProxyJump b,u@c:24\nHost b\n ProxyJump d\nHost c\n ProxyJump e\n"
        "Host loop\n ProxyJump loop2\nHost loop2\n ProxyJump loop\n"
        "Host proxied\n ProxyCommand nc %h %p\n"
    )
    way = route(resolve("a", config=str(config)))
    assert [(stop.hostname, stop.port) for stop in way] == [
        ("d", 22),
        ("b", 22),
        ("c", 24),
        ("a", 22),
    ]
    assert way[2].user == "u"
    with pytest.raises(UserError, match="is a host its own jump"):
        route(resolve("loop", config=str(config)))
    (stop,) = route(resolve("proxied", config=str(config)))
    assert stop.proxy_command == "nc proxied 22"


def test_a_jump_that_allows_none_is_said(new_server: NewServer, tmp_path: Path) -> None:
    first, last = new_server("AllowTcpForwarding no"), new_server()
    config = chain(tmp_path, first=first, last=last)
    host = replace(resolve("last", config=str(config)), proxy_jump=("first",))
    assert "the jump host first does not allow jumps" in refusal(host)
    open_one = new_server()
    config = chain(tmp_path, first=open_one, last=last)
    last.stop()
    assert "the jump host first cannot reach it" in refusal(host)


def test_a_proxy_command_is_the_way_and_leaves_nothing_behind(
    server: Server, tmp_path: Path
) -> None:
    inner = f"ssh -F {server.config} -W 127.0.0.1:%p server"
    host = replace(host_of(server), proxy_command=inner.replace("%p", str(server.port)))
    before = children()
    with signed_in(host) as connection:
        assert output(connection, "id -un") == f"{USER}\n"
        assert len(children() - before) == 1
    # Not even a zombie.
    assert children() == before


def test_a_proxy_command_that_fails_is_said(server: Server) -> None:
    before = children()
    said = refusal(replace(host_of(server), proxy_command="sh -c 'exit 7'"))
    assert "ProxyCommand 'sh -c 'exit 7'' ended (exit code 7)" in said
    assert children() == before


def test_a_proxy_command_that_ignores_the_end_is_ended(server: Server, tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(
        "import signal, subprocess\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"words = ['ssh', '-F', '{server.config}', '-W', '127.0.0.1:{server.port}', 'server']\n"
        "subprocess.run(words)\n"
        "signal.pause()\n"
    )
    before = children()
    host = replace(host_of(server), proxy_command=f"{sys.executable} {tmp_path}/stubborn.py")
    connection = signed_in(host)
    (process,) = children() - before
    connection.close()
    assert children() == before
    assert not Path(f"/proc/{process}").exists()


# ---- the other side ----


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Return a port at which anything can be said."""
    made = socket.create_server(("127.0.0.1", 0))
    yield made
    made.close()


def test_what_is_no_ssh_server_is_said(server: Server, listener: socket.socket) -> None:
    def greet() -> None:
        connection, _ = listener.accept()
        connection.sendall(b"HTTP/1.1 400 \x1b[2JBad Request\r\n\r\n")
        connection.close()

    threading.Thread(target=greet, daemon=True).start()
    said = refusal(replace(host_of(server), port=listener.getsockname()[1]))
    assert said.startswith("server: no SSH connection: ") and "\x1b" not in said


def test_a_server_that_falls_silent_in_the_key_exchange_is_given_up(
    server: Server, listener: socket.socket
) -> None:
    kept = []

    def begin() -> None:
        connection, _ = listener.accept()
        kept.append(connection)
        # All that a real one says before it has a key to show.
        with socket.create_connection(("127.0.0.1", server.port)) as real:
            real.sendall(b"SSH-2.0-test\r\n")
            connection.sendall(real.makefile("rb").readline())
            size = real.recv(4, socket.MSG_WAITALL)
            offer = real.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
            # On a busy machine the client may have left by now: it was given up all the same.
            with suppress(OSError):
                connection.sendall(size + offer)

    threading.Thread(target=begin, daemon=True).start()
    host = replace(host_of(server), port=listener.getsockname()[1], connect_timeout_s=1)
    assert "no SSH connection" in refusal(host)
    for connection in kept:
        connection.close()


def test_a_server_with_other_algorithms_is_said_and_leaves_no_thread(
    new_server: NewServer,
) -> None:
    server = new_server("Ciphers chacha20-poly1305@openssh.com")
    # Those of tests that ran in this process before are none of ours.
    before = set(threading.enumerate())
    said = refusal(host_of(server))
    assert said.startswith("server: no SSH connection: Incompatible")
    assert 'backend = "openssh"' in said
    # Paramiko's timer for the first key exchange would hold a process that ends for a minute.
    left = set(threading.enumerate()) - before
    assert [thread for thread in left if not thread.daemon] == []
    server.write_config("Ciphers chacha20-poly1305@openssh.com")
    assert "ciphers chacha20-poly1305@openssh.com: none of them is supported" in refusal(
        host_of(server)
    )


def test_the_user_s_algorithms_are_taken(server: Server) -> None:
    server.write_config(
        "Ciphers aes256-ctr", "MACs hmac-sha2-512", "KexAlgorithms ecdh-sha2-nistp384"
    )
    with signed_in(host_of(server)) as connection:
        assert connection.transport.remote_cipher == "aes256-ctr"
        assert connection.transport.remote_mac == "hmac-sha2-512"
    server.write_config("HostKeyAlgorithms ssh-rsa")
    assert "hostkeyalgorithms ssh-rsa: none of them is supported" in refusal(host_of(server))


def test_no_more_sessions_is_said(new_server: NewServer) -> None:
    server = new_server("MaxSessions 1")
    with signed_in(host_of(server)) as connection:
        kept = connection.open_session()
        with pytest.raises(UserError, match="the server refused a session"):
            connection.open_session()
        kept.close()


# ---- the end ----


def test_a_silent_server_is_given_up_though_output_waits_for_it(new_server: NewServer) -> None:
    server = new_server()
    with signed_in(host_of(server)) as connection:
        channel, other = connection.open_session(), connection.open_session()
        channel.exec_command("cat >/dev/null")
        other.exec_command("cat")
        server.send_children(signal.SIGSTOP)
        (hop,) = connection._hops
        hop.watchdog = Watchdog(hop.link, "server", interval_s=0.1, count_max=3)
        # More than the buffers between us hold.
        with pytest.raises(OSError):
            for _ in range(1000):
                channel.sendall(bytes(100_000))
        # It returns when the connection is closed.
        assert other.recv(1) == b""
        assert re.fullmatch(r"no answer from server for \d+ s", connection.lost or "")
        with pytest.raises(UserError, match="no answer from server"):
            connection.open_session()
        server.send_children(signal.SIGKILL)


def test_a_server_that_dies_is_named(new_server: NewServer) -> None:
    server = new_server()
    with signed_in(host_of(server)) as connection:
        channel = connection.open_session()
        channel.exec_command("cat")
        server.send_children(signal.SIGKILL)
        assert channel.recv(1) == b""
        wait_until(lambda: not connection.transport.is_active(), "the end", every_s=0.01)
        assert connection.lost == "server closed the connection"


def test_dead_hops_do_not_hold_up_the_end(
    new_server: NewServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = new_server(), new_server()
    config = chain(tmp_path, first=first, last=last)
    host = replace(resolve("last", config=str(config)), proxy_jump=("first",))
    connection = signed_in(host)
    first.send_children(signal.SIGSTOP)
    threads = {thread for thread in threading.enumerate() if "Transport" in repr(type(thread))}
    # They end at once; the limit of the wait for them is not needed.
    monkeypatch.setattr(connection_module, "CLOSE_S", HANGS_AFTER_S)
    connection.close()
    connection.close()
    assert not any(thread.is_alive() for thread in threads)
