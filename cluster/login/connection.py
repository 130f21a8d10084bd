"""A connection to a host: through its jumps, to a server that is known, signed in, watched."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Callable
from typing import Any, Self

import paramiko

from cluster.login import config, reach
from cluster.login.config import Host
from cluster.login.host_key import Check
from cluster.login.link import BROKEN, Link
from cluster.login.prompts import Prompts
from cluster.login.sign_in import sign_in
from cluster.login.transport import OPENSSH, to_stderr
from cluster.login.watchdog import Watchdog
from runfolder.errors import UserError, printable

# The servers of busy login nodes take their time before they send anything.
FIRST_WORDS_S, PROXY_WORDS_S = 60, 600
SESSION_TIMEOUT_S = 60.0
# As many as a chain of login nodes can need; a host that is its own jump would never end.
MOST_HOPS = 8
CLOSE_S = 1.0


@dataclasses.dataclass(kw_only=True)
class Hop:
    """One of the connections on the way."""

    host: Host
    link: Link
    proxy: reach.Proxy | None
    watchdog: Watchdog | None = None


class Connection:
    """An authenticated connection; a context manager that closes it."""

    def __init__(self, hops: list[Hop]) -> None:
        self._hops = hops
        self.host = hops[-1].host
        self.transport: paramiko.Transport = hops[-1].link
        """Of the last hop."""

    @property
    def lost(self) -> str:
        """Why the connection is gone ("no answer from NAME for 45 s"); empty while it is up."""
        # The hop that failed first took down those after it.
        for hop in self._hops:
            if hop.watchdog is not None and hop.watchdog.verdict:
                return hop.watchdog.verdict
            if not hop.link.is_active():
                return _end(hop)
        return ""

    def open_session(self) -> paramiko.Channel:
        """Return a new session channel, or raise a `UserError`."""
        try:
            return self.transport.open_session(timeout=SESSION_TIMEOUT_S)
        except paramiko.ChannelException as error:
            raise UserError(
                f"{self.host.alias}: the server refused a session ({printable(error.text)}); too "
                "many may be open (MaxSessions), or the account may not open any"
            ) from None
        except BROKEN as error:
            why = self.lost or printable(str(error)) or "the connection ended"
            raise UserError(f"{self.host.alias}: no session: {why}; try again") from None

    def close(self) -> None:
        """End all hops; takes two seconds at most, even with a dead peer. May be called twice."""
        _close(self._hops)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(
    host: Host, *, prompts: Prompts | None = None, say: Callable[[str], None] | None = None
) -> Connection:
    """Return a connection that is signed in.

    Args:
        host: as `config.resolve` returned it; its jumps are resolved in the same way.
        prompts: asks the user; None: on the terminal.
        say: shows banners and notes, free of control characters; None: on stderr.

    Raises:
        UserError: a host cannot be reached, has the wrong host key, or refuses the sign-in.
    """
    hops: list[Hop] = []
    try:
        for stop in route(host):
            _add_hop(hops, stop, prompts or Prompts(), say or to_stderr)
    except BaseException:
        _close(hops)
        raise
    return Connection(hops)


def route(host: Host) -> list[Host]:
    """Return the hosts on the way, the target last; a `UserError` if they never end.

    As with ssh, the first jump is reached as its own configuration says, and may have jumps of
    its own; each of the others is reached through those before it.
    """
    way = [host]
    while way[0].proxy_jump:
        jumps = []
        for name in way[0].proxy_jump:
            try:
                jumps.append(config.resolve(name, config=host.config))
            except UserError as error:
                raise UserError(f"the jump {printable(name)} of {way[0].alias}: {error}") from None
        rest = [dataclasses.replace(jump, proxy_jump=(), proxy_command="") for jump in jumps[1:]]
        way = [jumps[0], *rest, *way]
        if len(way) > MOST_HOPS:
            raise UserError(
                f"{host.alias}: its ProxyJump goes through more than {MOST_HOPS} hosts "
                f"({', '.join(stop.alias for stop in way[-4:])}); is a host its own jump?"
            )
    return way


def _add_hop(hops: list[Hop], host: Host, prompts: Prompts, say: Callable[[str], None]) -> None:
    check = Check.of(host)
    proxy: reach.Proxy | None = None
    stream: Any
    if hops:
        stream = reach.through(hops[-1].link, hops[-1].host, host)
    elif host.proxy_command:
        proxy = reach.Proxy(host)
        stream = proxy.socket
    else:
        stream = reach.tcp(host)
    try:
        link = Link(stream, host)
    except UserError:
        stream.close()
        if proxy is not None:
            proxy.close()
        raise
    options = link.get_security_options()
    options.key_types = check.preferred(options.key_types)
    hop = Hop(host=host, link=link, proxy=proxy)
    hops.append(hop)
    # A ProxyCommand may ask the user something before any data passes.
    usual_s = PROXY_WORDS_S if proxy is not None else FIRST_WORDS_S
    link.banner_timeout = float(host.connect_timeout_s or usual_s)
    try:
        # Paramiko also returns when the time is up.
        link.start_client(timeout=link.banner_timeout)
        if not link.initial_kex_done:
            raise EOFError(f"the key exchange did not finish in {link.banner_timeout:.0f} s")
        key = link.get_remote_server_key()
    except BROKEN as error:
        said = link.last_words or str(error) or "the other side closed it"
        # Paramiko's sentence runs into the text that follows.
        said = printable(said.replace("SSH protocol banner", "the server's first words: "))
        why = (proxy.ended() if proxy is not None else "") or said
        step = "is that an SSH server, and may you connect to it?"
        if "Incompatible" in why:
            step = f"the server requires other algorithms; {OPENSSH}"
        raise UserError(f"{host.alias}: no SSH connection: {why}; {step}") from None
    check.check(key, prompts, say)
    sign_in(link, host, prompts, say)
    hop.watchdog = Watchdog(
        link, host.alias, host.server_alive_interval_s, host.server_alive_count_max
    )


def _end(hop: Hop) -> str:
    if words := printable(hop.link.last_words):
        return f"{hop.host.alias} ended the connection: {words}"
    error = hop.link.saved_exception
    why = "" if error is None or isinstance(error, EOFError) else f": {printable(str(error))}"
    return f"{hop.host.alias} closed the connection{why}"


def _close(hops: list[Hop]) -> None:
    """End the hops in order: after the first, the others cannot hold anything up."""
    for hop in hops:
        if hop.watchdog is not None:
            hop.watchdog.is_over.set()
        # Otherwise the timer of a failed first key exchange delays the exit of this process.
        hop.link.packetizer.complete_handshake()
        if isinstance(hop.link.sock, socket.socket):
            # Wakes the thread that reads; close() alone does not.
            with contextlib.suppress(OSError):
                hop.link.sock.shutdown(socket.SHUT_RDWR)
        hop.link.close()
        if hop.proxy is not None:
            hop.proxy.close()
    for hop in hops:
        if hop.link.is_alive():
            hop.link.join(CLOSE_S / len(hops))
