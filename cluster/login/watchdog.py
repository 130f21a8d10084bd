"""Is the other side still there? Asks at intervals, and gives up if no answer comes."""

from __future__ import annotations

import contextlib
import threading

from cluster.login.link import BROKEN, Link


class Watchdog:
    """Watches a link that is signed in, and closes it when a request gets no answer."""

    def __init__(self, link: Link, name: str, interval_s: float, count_max: int) -> None:
        self._link = link
        self._name = name
        self._interval_s = interval_s
        self._patience_s = interval_s * count_max
        self.is_over = threading.Event()
        """Set it to stop watching."""
        self.verdict = ""
        """Why it closed the link."""
        threading.Thread(target=self._watch, daemon=True, name=f"watch {name}").start()

    def _watch(self) -> None:
        while not self.is_over.wait(self._interval_s) and self._link.is_active():
            # In a thread of its own: with a full buffer to a dead peer it waits forever.
            question = threading.Thread(target=self._ask, daemon=True)
            question.start()
            question.join(self._patience_s)
            if question.is_alive() and not self.is_over.is_set():
                self.verdict = f"no answer from {self._name} for {self._patience_s:.0f} s"
                self._link.close()
                return

    def _ask(self) -> None:
        # Any server answers, if only that it does not know the request.
        with contextlib.suppress(*BROKEN):
            self._link.global_request("keepalive@openssh.com")
