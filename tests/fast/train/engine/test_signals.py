"""Requests to stop, in a process of their own: pytest needs its handlers."""

from __future__ import annotations

import subprocess
import sys

from tests.shared import CHECKOUT


def run(code: str) -> str:
    words = [sys.executable, "-c", f"import os, signal; from train.engine import signals; {code}"]
    return subprocess.run(words, cwd=CHECKOUT, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_before_torch_is_there_usr1_is_remembered_and_term_ends() -> None:
    code = "signals.install_first(); os.kill(os.getpid(), signal.SIGUSR1)"
    assert run(f"{code}; print(signals.received())") == "SIGUSR1\n"
    code = "signals.install_first(); print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    assert run(code) == "True\n"


def test_a_rehearsal_is_forgotten_and_a_real_request_is_not() -> None:
    code = "signals.install(); signals.rehearse(); "
    assert run(code + "signals.forget_rehearsal(); print(signals.received())") == "None\n"
    code += "os.kill(os.getpid(), signal.SIGTERM); "
    assert run(code + "signals.forget_rehearsal(); print(signals.received())") == "SIGTERM\n"
