"""`accelerate launch`, with the exit code of the training script instead of always 1.

    python -m slurm.launch <arguments of accelerate launch>

The caller must distinguish "saved, run me again" (75) from a failure and from bad input (2); the
launcher itself exits with 1 for all of them, after a traceback that does not show the cause.
"""

import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

if "SLUICE_STEP" in os.environ:
    # Asked to save before there is anything to save; torch, once imported, has its own handler.
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))
else:
    # Ctrl+C ends it; an exception within the imports of a library may be caught there.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from accelerate.commands.launch import main as accelerate_launch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from runfolder import attempts, records
from runfolder.exit_codes import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_SAVED, of_outcome
from runfolder.files import write_atomically
from runfolder.launch import read
from slurm.forked import fork_from_now_on
from slurm.interface import use_interface_towards

# How long a run's outcome may take after the processes of another node have ended.
PATIENCE_S = 60
# In an attempt's folder: the signal that has ended the processes of a node.
ENDED = "ended-by"
LOOK_S = 5.0
# The signal by which the processes were asked to end.
asked = ""


def main() -> int:
    """Launch, and return the exit code of the script's processes; in a Slurm step, 0 if saved.

    There, any other code ends the other nodes' processes, the first of which publishes.
    """
    run = Path(os.environ.get("SLUICE_RUN_FOLDER", ""))
    if address := os.environ.get("MASTER_ADDR"):
        use_interface_towards(address, read(run).get("interface", ""))
    if (program := records.program(run)) is not None:
        pass_ctrl_c_on(program["signal"])
        if os.environ.get("SLUICE_NODE_RANK") == "0":
            end_with_the_others(attempts.folder_of(run, attempts.current()) / ENDED)
    elif os.environ.get("SLUICE_DEVICE") == "cpu":
        # Not with GPUs: a process that has touched CUDA must not be forked.
        fork_from_now_on()
    code = launch()
    if os.environ.get("SLUICE_NODE_RANK", "0") == "0":
        attempts.write_outcome_of_program(run, code, asked)
    if code == EXIT_BAD_INPUT and "SLUICE_STEP" in os.environ:
        # srun would return the code of a node that it then kills.
        reason = "the script rejected its settings"
        attempts.write_outcome(run, outcome="failed", exit_code=code, reason=reason)
    return 0 if code == EXIT_SAVED and "SLUICE_STEP" in os.environ else code


def launch() -> int:
    """Launch, and return the exit code of the script's processes."""
    try:
        accelerate_launch()
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # The other ranks fail because the first did: its code counts.
        telling = [code for code in codes if code in (EXIT_BAD_INPUT, EXIT_SAVED)] or [
            code for code in codes if code > 0
        ]
        # A process that a signal killed has a negative code; shells say 128 + signal.
        return telling[0] if telling else 128 - codes[0]
    except SignalException as error:
        # The processes' codes are lost here; the attempt's outcome shows them.
        run = Path(os.environ["SLUICE_RUN_FOLDER"])
        if records.program(run) is not None:
            # All that is known of one that is not ours: it ended when it was asked to.
            global asked
            asked = asked or signal.Signals(error.sigval).name
            write_atomically(attempts.folder_of(run, attempts.current()) / ENDED, asked)
            return EXIT_SAVED
        # The first node writes it, when the processes of the others may have ended already.
        is_first = os.environ.get("SLUICE_NODE_RANK", "0") == "0"
        until = time.monotonic() + (0 if is_first else PATIENCE_S)
        while (outcome := attempts.read(run, attempts.current()).outcome) is None:
            if time.monotonic() >= until:
                return EXIT_FAILED if "SLUICE_STEP" in os.environ else 128 + error.sigval
            time.sleep(0.2)
        return of_outcome(str(outcome.get("outcome")))
    return 0


def end_with_the_others(marker: Path) -> None:
    """Have this node's processes asked to save when another node's were ended by a signal.

    Slurm may signal one node alone: one that comes back from a loss is told to end the job that it
    runs again by now. The others would wait for it in init_process_group for half an hour.
    """
    told, tells = os.pipe()
    os.set_blocking(tells, False)
    # Any signal to this launcher is written there, whoever handles it.
    signal.set_wakeup_fd(tells)

    def watch() -> None:
        looks = 0
        while not select.select([told], [], [], LOOK_S)[0]:
            # At the second look, since the signal may have been for this node, too, and be on its
            # way; and not before the launcher has its handlers, or it would be killed.
            looks += marker.exists() and callable(signal.getsignal(signal.SIGTERM))
            if looks == 2:
                os.kill(os.getpid(), signal.Signals[marker.read_text()])
                return

    threading.Thread(target=watch, name="others", daemon=True).start()


def pass_ctrl_c_on(name: str) -> None:
    """Have Ctrl+C ask a script that is not ours as its job says; a second one ends it.

    The launcher would hand SIGINT on as it came, which ends most scripts before they save.
    """
    handled = os.environ["PET_SIGNALS_TO_HANDLE"].split(",")
    os.environ["PET_SIGNALS_TO_HANDLE"] = ",".join(one for one in handled if one != "SIGINT")
    passed_on = signal.SIGUSR1 if name == "USR1" else signal.SIGTERM

    def ask(number: int, frame: object) -> None:
        global asked
        asked = "Ctrl+C"
        os.kill(os.getpid(), passed_on)

    signal.signal(signal.SIGINT, ask)


if __name__ == "__main__":
    sys.exit(main())
