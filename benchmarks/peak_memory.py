"""Run a command and print its exit code, its peak memory in bytes and its seconds, as JSON.

    python -I -S benchmarks/peak_memory.py COMMAND [ARGUMENT ...]

A separate process because of how Linux counts: a child's peak starts at the memory of its parent
at the fork. So a small parent must fork it, not the benchmark with its libraries.
"""

import json
import os
import sys
import time

started = time.monotonic()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
report = {
    "exit_code": os.waitstatus_to_exitcode(status),
    "peak_bytes": usage.ru_maxrss * 1024,
    "seconds": round(time.monotonic() - started, 2),
}
print("\n" + json.dumps(report))
