"""Commands that are given on a laptop and run on the cluster.

The checkout is copied there, and the same command runs in it, with its output, its questions and
its exit code here: it works on the laptop as on the login node.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import split_at_dashes
from cluster.login.transport import LOST, Transport
from cluster.site.settings import ARRIVED, Site

if TYPE_CHECKING:
    from cluster.plan.job import Job


def carry_out(site: Site, words: list[str]) -> int:
    """Run `python -m cluster WORDS...` on the login node; return its exit code.

    A job of one's own that --job names is copied, too.

    Raises:
        UserError: the login node cannot be reached, or the checkout or the job cannot be copied.
    """
    # The login node itself does not need these.
    from cluster.login.backends import connect
    from cluster.remote.sync import bring, pack_job

    own = None if site.is_private else _own_job(words)
    parcel = pack_job(own) if own else None
    with connect(site) as login:
        if own and parcel:
            options, rest = split_at_dashes(words)
            # The last one counts.
            options.append(f"--job={bring(login, site, parcel)}/{own.path.name}")
            words = [*options, "--", *rest]
        code = login.run(script(site, checkout(login, site), words), site.ssh.modules)
    if code == LOST:
        print(
            "the command there is still running, or never started: make status shows it",
            file=sys.stderr,
        )
    return code


def _own_job(words: list[str]) -> Job | None:
    """Return the job that these words begin anew, if its file or its script is not in the checkout.

    Raises:
        UserError: there is no such job.
    """
    from cluster.plan.job import load_job

    options, _ = split_at_dashes(words)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--job")
    parser.add_argument("--run")
    found, _ = parser.parse_known_args(options)
    # A run to continue has a copy of its own.
    if not found.job or found.run:
        return None
    job, here = load_job(found.job), Path.cwd().resolve()
    is_here = job.path.resolve().is_relative_to(here) and job.script_folder is None
    return None if is_here else job


def checkout(login: Transport, site: Site) -> str:
    """Return the folder on the cluster that holds the checkout as it is here."""
    from cluster.remote import sync

    if not site.is_private:
        return sync.bring(login, site, sync.pack(site))
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
