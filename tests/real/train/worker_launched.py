"""What test_launcher.py has launched in the place of a script, without torch.

accelerate launch ... -m tests.real.train.worker_launched FOLDER CODE_OF_RANK_0 CODE_OF_RANK_1

Each rank leaves what it found and its PID, and ends with its code; a negative one is a signal that
it sends itself, and `wait` ends by a signal only.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

from runfolder.files import write_atomically
from tests.waiting import wait_until
from train.engine import signals


def main(folder: str, *codes: str) -> int:
    """End as this rank was told to."""
    rank = os.environ["RANK"]
    code = codes[int(rank)]
    signals.die_with_launcher()
    left = {"pid": os.getpid(), "environment": dict(os.environ), **found()}
    write_atomically(Path(folder, f"rank-{rank}.json"), json.dumps(left))
    # The launcher ends all when the first has ended.
    files = [Path(folder, f"rank-{number}.json") for number in range(len(codes))]
    wait_until(lambda: all(file.exists() for file in files), "all have begun")
    while code == "wait":
        signal.pause()
    if int(code) < 0:
        os.kill(os.getpid(), -int(code))
    return int(code)


def found() -> dict[str, Any]:
    """Return what a process has of the one that started it, beside the environment."""
    status = Path("/proc/self/status").read_text()
    files = {int(file.name): file for file in Path("/proc/self/fd").iterdir()}
    return {
        "leads its session": os.getsid(0) == os.getpid(),
        # Those of POSIX but SIGINT: before they load torch, ours say what that does.
        "signals": {
            name: int(mask, 16) & 0x7FFFFFFF & ~(1 << signal.SIGINT - 1)
            for name, mask in re.findall(r"^(Sig(?:Blk|Ign|Cgt)):\s+(\w+)", status, re.MULTILINE)
        },
        "sockets": [n for n, file in files.items() if n > 2 and file.is_socket()],
        "folders": [str(Path.cwd()), sys.path[0]],
        "words": sys.argv,
        "name": Path("/proc/self/comm").read_text().strip(),
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
