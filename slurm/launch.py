"""`accelerate launch`, with the exit code of the training script instead of always 1.

    python -m slurm.launch <arguments of accelerate launch>

The caller must tell "saved, run me again" (75) from a failure and from bad input (2); the launcher
itself exits 1 for all of them, after a traceback of its own that says nothing of the cause.
"""

import os
import signal
import sys
import time
from pathlib import Path

if "SLUICE_STEP" in os.environ:
    # Asked to save before there is anything to save; torch, once it is imported, listens itself.
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))

from accelerate.commands.launch import main as accelerate_launch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from runfolder import attempts, records
from runfolder.exit_codes import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_SAVED, of_outcome
from runfolder.launch import read
from slurm.interface import use_interface_towards

# How long the last words of a run may take after the processes of another node have ended.
PATIENCE_S = 60
# The signal by which the processes were asked to end.
asked = ""


def main() -> int:
    """Launch, and return what the script's processes returned; in a step of Slurm's 0 if saved.

    There a code that is not 0 ends the other nodes' processes, of which the first publishes.
    """
    if address := os.environ.get("MASTER_ADDR"):
        of_run = read(Path(os.environ["SLUICE_RUN_FOLDER"]))
        use_interface_towards(address, of_run.get("interface", ""))
    code = launch()
    if os.environ.get("SLUICE_NODE_RANK", "0") == "0":
        attempts.write_outcome_of_program(Path(os.environ["SLUICE_RUN_FOLDER"]), code, asked)
    if code == EXIT_BAD_INPUT and "SLUICE_STEP" in os.environ:
        # srun would tell of the node that it kills then.
        run = Path(os.environ["SLUICE_RUN_FOLDER"])
        reason = "it refuses what it was started with"
        attempts.write_outcome(run, outcome="failed", exit_code=code, reason=reason)
    return 0 if code == EXIT_SAVED and "SLUICE_STEP" in os.environ else code


def launch() -> int:
    """Launch, and return what the script's processes returned."""
    try:
        accelerate_launch()
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # The other ranks fail because the first did: what it says counts.
        telling = [code for code in codes if code in (EXIT_BAD_INPUT, EXIT_SAVED)] or [
            code for code in codes if code > 0
        ]
        # A process that a signal killed has a negative code; shells say 128 + signal.
        return telling[0] if telling else 128 - codes[0]
    except SignalException as error:
        # The processes' codes are lost on this way; the attempt's outcome tells.
        run = Path(os.environ["SLUICE_RUN_FOLDER"])
        if records.program(run) is not None:
            # All that is known of one that is not ours: it ended when it was asked to.
            global asked
            asked = signal.Signals(error.sigval).name
            return EXIT_SAVED
        # The first node writes it, when the processes of the others have ended already.
        is_first = os.environ.get("SLUICE_NODE_RANK", "0") == "0"
        until = time.monotonic() + (0 if is_first else PATIENCE_S)
        while (outcome := attempts.read(run, attempts.current()).outcome) is None:
            if time.monotonic() >= until:
                return EXIT_FAILED
            time.sleep(0.2)
        return of_outcome(str(outcome.get("outcome")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
