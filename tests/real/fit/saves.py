"""What somebody might bring: asked by a signal, it saves and exits with 75."""

import signal
import sys
import time
from pathlib import Path


def save(number: int, frame: object) -> None:
    Path("saved").write_text(signal.Signals(number).name)
    sys.exit(75)


if "--resume" in sys.argv:
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
Path("ready").touch()
time.sleep(3600)
