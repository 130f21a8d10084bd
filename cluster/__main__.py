"""The commands behind make's targets.

python -m cluster run --job JOB [--dry_run | --fetch] [-- ARGS]
python -m cluster submit --job JOB [--accel ACCEL] [--nodes N] [--plan 1] [-- ARGS]
python -m cluster sweep --job JOB --grid "KEY=VALUE,VALUE ..." [--max N] [--name NAME] [-- ARGS]
python -m cluster status [--run RUN | --name SWEEP] [--format json]
python -m cluster logs --run RUN [--node 1]
python -m cluster cancel --run RUN | --name SWEEP
python -m cluster check [--job JOB [--nodes N] [--gpus N] [--time T]] [--format json]
python -m cluster check-site
python -m cluster ssh [--command COMMAND]
python -m cluster tunnel --run RUN [--port PORT]
python -m cluster board --run RUN
python -m cluster image verify|sign IMAGE [--key KEY]
python -m cluster train-module MODULE --run RUN | --model FOLDER [-- WORD ...]

`python -m cluster COMMAND --help` lists the options of a command.
"""

from __future__ import annotations

import importlib
import io
import sys

from cluster.errors import run_to_exit
from runfolder.errors import UserError, did_you_mean

# On a laptop these run on the cluster, over SSH.
ON_THE_CLUSTER = ("status", "logs", "cancel", "check")
HERE = ("check-site", "run", "submit", "sweep", "ssh", "tunnel", "board", "image", "train-module")
COMMANDS = (*ON_THE_CLUSTER, *HERE)


def main(argv: list[str]) -> int:
    """Run one of the commands; return its exit code."""
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(__doc__.strip())
        return 0
    name, *words = argv
    if name not in COMMANDS:
        raise UserError(f"'{name}' is not a command{did_you_mean(name, COMMANDS)}")
    if name in ON_THE_CLUSTER:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A character that the terminal lacks is replaced; the list is shown all the same.
            sys.stdout.reconfigure(errors="replace")
        if not {"--help", "-h"} & set(words):
            from cluster.remote import calls
            from cluster.site.file import load_site

            if (site := load_site()).is_elsewhere:
                return calls.carry_out(site, argv)
    # Imported here, so that a command loads only the libraries that it needs.
    module = importlib.import_module(f"cluster.commands.{name.replace('-', '_')}")
    code: int = module.main(words)
    return code


if __name__ == "__main__":
    run_to_exit(main)
