"""What the health check of one node has found so far, kept in a file as soon as it is known."""

import json
import secrets
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class Unhealthy(Exception):
    """A check failed; the text is one plain sentence that needs no context."""

    def __init__(self, problem: str, *, guilty: bool | None = None) -> None:
        super().__init__(problem)
        # None: the check that found it decides.
        self.guilty = guilty


class Report:
    """The results of one node, in node-K.json; a hang or a kill keeps what was found before."""

    def __init__(self, folder: Path, node: str, rank: int) -> None:
        self.file = folder / f"node-{rank}.json"
        # The token shows the others that they read the file of this very check.
        self.content: dict[str, Any] = {
            "node": node,
            "rank": rank,
            "token": secrets.token_hex(8),
            "checks": [],
            "during": None,
            "missing": [],
            "elsewhere": [],
            "bandwidth_bytes_per_second": None,
            "seconds": 0.0,
            "done": False,
        }
        self._guilty = True
        self._began = time.monotonic()
        # The timer at the deadline writes too.
        self._lock = threading.Lock()
        self._unwritable: str | None = None

    def begin(self, name: str, *, guilty: bool) -> None:
        """Record which check begins, and whether this node is at fault if it fails or hangs."""
        self._guilty = guilty
        self.content["during"] = name
        self.save()

    def passed(self, value: str) -> None:
        """Record that the current check passed."""
        self._record(value, None, guilty=False)

    def failed(self, problem: Unhealthy) -> None:
        """Record what is wrong in the current check."""
        guilty = self._guilty if problem.guilty is None else problem.guilty
        self._record(None, str(problem), guilty=guilty)

    def finish(self) -> bool:
        """Close the report and return whether all checks passed."""
        self.content |= {"during": None, "done": True}
        self.save()
        return not self._unwritable and all(check["ok"] for check in self.content["checks"])

    def seconds(self) -> float:
        """Return the time since the check began."""
        return time.monotonic() - self._began

    def hung(self, timeout_s: float) -> None:
        """Record that the current check does not end; the process is given up after this."""
        during = self.content["during"]
        self.failed(Unhealthy(f"{during}: did not finish within {timeout_s:.0f} s"))

    def save(self) -> None:
        """Write the file; if that fails, print it once and continue: the other nodes wait."""
        # Only a hanging file system holds it for longer.
        if not self._lock.acquire(timeout=2):
            return
        try:
            self.content["seconds"] = round(self.seconds(), 3)
            temporary = self.file.with_name(f".{self.file.name}.new")
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(self.content, indent=2) + "\n")
                temporary.replace(self.file)
            except OSError as error:
                if self._unwritable is None:
                    self._unwritable = error.strerror or str(error)
                    node = self.content["node"]
                    with suppress(OSError):
                        print(f"preflight: {node}: {self.unwritable()}", file=sys.stderr)
        finally:
            self._lock.release()

    def unwritable(self) -> str | None:
        """Return why the file could not be written, None if it could."""
        if self._unwritable is None:
            return None
        return f"run folder {self.file.parent}: cannot be written ({self._unwritable})"

    def _record(self, value: str | None, problem: str | None, *, guilty: bool) -> None:
        self.content["checks"].append(
            {
                "name": self.content["during"],
                "ok": problem is None,
                "value": value,
                "problem": problem,
                "guilty": guilty,
            }
        )
        self.save()
