"""The two ways to a login node: OpenSSH's programs where they are, and Paramiko."""

from __future__ import annotations

import shutil

from cluster.login.alarm import leave_on_signals
from cluster.login.transport import Transport
from cluster.site.settings import Site


def connect(site: Site) -> Transport:
    """Return a connection to the site's login node, signed in.

    By the ssh command where there is one, whatever `backend` says, which is about terminals: files
    travel twice as fast through it as through Paramiko.

    Raises:
        UserError: it cannot be had.
    """
    # What was made for the connection is removed then, too.
    leave_on_signals()
    # Neither library nor command is waited for by those who need the other.
    if site.ssh.backend == "openssh" or shutil.which("ssh"):
        from cluster.login.openssh import OpenSsh

        return OpenSsh(site.ssh)
    from cluster.login.channels import Channels

    return Channels(site.ssh)
