"""Commands that are given on a laptop and run on the cluster.

The checkout is copied there, and the same command runs in it, with its output, its questions and
its exit code here: it works on the laptop as on the login node.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from cluster.login.transport import LOST, Transport
from cluster.site.settings import ARRIVED, Site


def carry_out(site: Site, words: list[str]) -> int:
    """Run `python -m cluster WORDS...` on the login node; return its exit code.

    Raises:
        UserError: the login node cannot be reached, or the checkout cannot be copied there.
    """
    # The login node itself does not need this.
    from cluster.login.backends import connect

    with connect(site) as login:
        code = login.run(script(site, checkout(login, site), words), site.ssh.modules)
    if code == LOST:
        print(
            "the command there is still running, or never started: make status shows it",
            file=sys.stderr,
        )
    return code


def checkout(login: Transport, site: Site) -> str:
    """Return the folder on the cluster that holds the checkout as it is here."""
    from cluster.remote import sync

    if not site.is_private:
        return sync.bring(login, site)
    # Its login node is on this machine. This script reports problems with the login files, because
    # the next one could not report them.
    folder = str(Path.cwd())
    login.ask(f"cd -- {shlex.quote(folder)}")
    return folder


def script(site: Site, folder: str, words: list[str]) -> str:
    """Return a bash script that runs a command of ours in a checkout on the cluster."""
    # A link to an environment that outlives this checkout.
    venv = shlex.quote(os.environ.get("VENV", ".venv")) if site.is_private else ".venv"
    lines = [
        f"cd -- {shlex.quote(folder)} || exit 2",
        f'export {ARRIVED}=1 VENV="$(readlink -f -- {venv})"',
    ]
    lines += [
        "containers/venv.sh --base || exit",
        f'exec slurm/isolated.sh "$VENV/bin/python" -m cluster {shlex.join(words)}',
    ]
    return "\n".join(lines)
