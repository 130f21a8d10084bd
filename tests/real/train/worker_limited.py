"""Runs a module as `python -m` does, with a limit on its memory: `ulimit -d`, but from here on.

Ranks(ACCEL, NUM_PROCESSES, "tests.real.train.worker_limited", MIB, MODULE, WORD...)

The system counts what a process may write to and shares with nobody: not the code of libraries.
"""

from __future__ import annotations

import re
import resource
import runpy
import sys
from pathlib import Path


def main(mib: str, module: str, *words: str) -> None:
    """Allow MIB more than the libraries took when they were imported."""
    status = Path("/proc/self/status").read_text()
    (taken,) = re.findall(r"^VmData:\s+(\d+) kB$", status, re.MULTILINE)
    limit = int(taken) * 1024 + int(mib) * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
