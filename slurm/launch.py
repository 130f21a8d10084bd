"""`accelerate launch`, with the exit code of the training script instead of always 1.

    python slurm/launch.py <arguments of accelerate launch>

The caller must tell "saved, run me again" (75) from a failure and from bad input (2); the launcher
itself exits 1 for all of them, after a traceback of its own that says nothing of the cause.
"""

import json
import os
import sys
from pathlib import Path

from accelerate.commands.launch import main as accelerate_launch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

EXIT_CODES = {"finished": 0, "stopped": 75}


def main() -> int:
    """Launch, and return what the script's processes returned."""
    try:
        accelerate_launch()
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # The other ranks fail because the first did: what it says counts.
        telling = [code for code in codes if code in (2, 75)] or [
            code for code in codes if code > 0
        ]
        # A process that a signal killed has a negative code; shells say 128 + signal.
        return telling[0] if telling else 128 - codes[0]
    except SignalException:
        # The processes' codes are lost on this way; the attempt's outcome tells.
        attempt = os.environ.get("SLUICE_ATTEMPT", "1")
        outcome = Path(os.environ["SLUICE_RUN_FOLDER"]) / "attempts" / attempt / "outcome.json"
        if not outcome.exists():
            return 1
        return EXIT_CODES.get(json.loads(outcome.read_text())["outcome"], 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
