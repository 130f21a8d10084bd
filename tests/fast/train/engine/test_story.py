"""The story of a run is out at once."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.shared import CHECKOUT


def test_what_is_said_is_out_at_once() -> None:
    # Into a pipe, which Python would fill before it hands anything on; _exit empties nothing.
    program = "import os; from train.engine.story import say; say('step 1'); os._exit(0)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "step 1\n"
