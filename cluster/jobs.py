"""`make status`, `make logs`, `make cancel`, `make check`: jobs, and what runs them.

python -m cluster.jobs status [--run RUN] [--format json]
python -m cluster.jobs logs --run RUN [--node 1]
python -m cluster.jobs cancel --run RUN
python -m cluster.jobs check [--job JOB [--nodes N] [--gpus N] [--time T]] [--format json]
"""

from __future__ import annotations

import importlib
import io
import sys

from cluster import remote, site
from cluster.errors import run_to_exit
from runfolder.errors import UserError, did_you_mean

COMMANDS = {
    "status": "cluster.status",
    "logs": "cluster.logs",
    "cancel": "cluster.cancel",
    "check": "cluster.check.command",
}


def main(argv: list[str]) -> int:
    """Run one of the commands; return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a letter of a name shows another; the list is not lost for it.
        sys.stdout.reconfigure(errors="replace")
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(__doc__.strip())
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"'{argv[0]}' is not a command{did_you_mean(argv[0], COMMANDS)}")
    settings = site.load()
    if settings.is_elsewhere and not {"--help", "-h"} & set(argv):
        return remote.carry_out(settings, "cluster.jobs", argv)
    # Each needs its own libraries, and none shall wait for the others'.
    code: int = importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    return code


if __name__ == "__main__":
    run_to_exit(main)
