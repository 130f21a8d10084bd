"""The two ways to a login node: OpenSSH's programs if they are installed, and Paramiko."""

from __future__ import annotations

import shutil

from cluster.login.alarm import leave_on_signals
from cluster.login.transport import Transport
from cluster.site.settings import Site


def connect(site: Site) -> Transport:
    """Return a connection to the site's login node, signed in.

    With the ssh command if there is one, whatever `backend` says, which is about terminals: it
    transfers files twice as fast as Paramiko.

    Raises:
        UserError: the connection failed.
    """
    # So that what was created for the connection is removed then, too.
    leave_on_signals()
    # Imported here, so that only the one that is needed is loaded.
    if site.ssh.backend == "openssh" or shutil.which("ssh"):
        from cluster.login.openssh import OpenSsh

        return OpenSsh(site.ssh)
    from cluster.login.channels import Channels

    return Channels(site.ssh)
