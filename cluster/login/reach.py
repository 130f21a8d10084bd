"""The stream to a host's sshd: over TCP, through a ProxyCommand, or through the previous hop."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess

import paramiko

from cluster.login.config import Host
from cluster.login.link import BROKEN, Link
from runfolder.errors import UserError, printable

FAMILIES = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}
FORWARD_TIMEOUT_S = 60
# How long a ProxyCommand may take to end once its stream is closed, and after SIGTERM.
GRACE_S = 0.5


def tcp(host: Host) -> socket.socket:
    """Return a connection to the first of the host's addresses that accepts one.

    Raises:
        UserError: none does; says why for each.
    """
    family = FAMILIES.get(host.address_family, socket.AF_UNSPEC)
    try:
        addresses = socket.getaddrinfo(host.hostname, host.port, family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{host.alias}: could not resolve hostname {host.hostname} "
            f"({getattr(error, 'strerror', None) or error}); is it spelled correctly, and is the "
            "network (or VPN) up?"
        ) from None
    failures = []
    for kind, *_, address in addresses:
        made = socket.socket(kind, socket.SOCK_STREAM)
        made.settimeout(host.connect_timeout_s)
        try:
            made.connect(address)
        except OSError as error:
            made.close()
            why = error.strerror or f"no answer for {host.connect_timeout_s} s"
            failures.append(f"{address[0]} port {host.port}: {why}")
        else:
            # A keystroke is a packet that must not wait for the next one.
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return made
    raise UserError(f"{host.alias}: cannot be reached ({'; '.join(failures)}); is the network up?")


class Proxy:
    """A ProxyCommand that runs, and our end of its stream."""

    def __init__(self, host: Host) -> None:
        """Start the command, or raise a `UserError`."""
        self._command = host.proxy_command
        ours, theirs = socket.socketpair()
        try:
            # As ssh runs it: by the user's shell, with exec; stderr stays the user's.
            self._process = subprocess.Popen(
                [os.environ.get("SHELL") or "/bin/sh", "-c", f"exec {host.proxy_command}"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
            )
        except OSError as error:
            ours.close()
            raise UserError(f"{host.alias}: ProxyCommand: {error.strerror}") from None
        finally:
            theirs.close()
        self.socket = ours

    def ended(self) -> str:
        """Return how the command ended; empty if it is running."""
        try:
            code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return ""
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        return f"the ProxyCommand '{printable(self._command)}' ended ({how})"

    def close(self) -> None:
        """Close the stream and wait for the command to end; takes a second at most."""
        self.socket.close()
        for end in (self._process.terminate, self._process.kill):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
                return
            end()
        # Otherwise it stays as a zombie.
        self._process.wait()


def through(link: Link, before: Host, host: Host) -> paramiko.Channel:
    """Return a stream to a host that the hop before it connects to, or raise a `UserError`."""
    try:
        return link.open_channel(
            "direct-tcpip",
            (host.hostname, host.port),
            ("127.0.0.1", 0),
            timeout=host.connect_timeout_s or FORWARD_TIMEOUT_S,
        )
    except paramiko.ChannelException as error:
        prohibited = error.code == 1
        why = "does not allow jumps" if prohibited else "cannot reach it"
        step = "AllowTcpForwarding is off there; ask the site" if prohibited else "is it up?"
        raise UserError(
            f"{host.alias}: the jump host {before.alias} {why} "
            f"({host.hostname} port {host.port}: {printable(error.text)}); {step}"
        ) from None
    except BROKEN as error:
        raise UserError(
            f"{host.alias}: could not connect through the jump host {before.alias}: "
            f"{printable(str(error))}"
        ) from None
