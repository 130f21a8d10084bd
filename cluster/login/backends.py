"""The two ways to a login node: OpenSSH's programs, and Paramiko."""

from __future__ import annotations

import signal
from typing import NoReturn

from cluster.login.transport import Transport
from cluster.site import Site


def connect(site: Site) -> Transport:
    """Return a connection to the site's login node, signed in.

    Raises:
        UserError: it cannot be had.
    """
    # What was made for the connection is removed then, too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    # Neither library nor command is waited for by those who need the other.
    if site.ssh.backend == "openssh":
        from cluster.login.openssh import OpenSsh

        return OpenSsh(site.ssh)
    from cluster.login.channels import Channels

    return Channels(site.ssh)


def _leave(number: int, _: object) -> NoReturn:
    # Nothing interrupts what is given back on the way out.
    for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)
