"""Is the other side still there? Asked after a silence; given up after a few."""

from __future__ import annotations

import threading
import time

from paramiko.common import cMSG_GLOBAL_REQUEST
from paramiko.message import Message

from cluster.login.link import BROKEN, Link


class Watchdog:
    """Watches a link that is signed in, and closes it when nothing is heard any more."""

    def __init__(self, link: Link, name: str, interval_s: float, count_max: int) -> None:
        self._link = link
        self._name = name
        self._interval_s = interval_s
        self._count_max = count_max
        self._over = threading.Event()
        self._is_asking = False
        self.verdict: str | None = None
        """Why it closed the link."""
        self._thread = threading.Thread(target=self._watch, daemon=True, name=f"watch {name}")
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._over.set()

    def _watch(self) -> None:
        heard = time.monotonic()
        asked = 0
        asked_at = heard
        while not self._over.wait(max(0.0, asked_at + self._interval_s - time.monotonic())):
            if not self._link.is_active():
                return
            now = time.monotonic()
            if self._link.last_heard > heard:
                heard, asked = self._link.last_heard, 0
                # The next silence begins with what was heard last.
                asked_at = heard
                continue
            if asked >= self._count_max:
                self.verdict = f"no answer from {self._name} for {now - heard:.0f} s"
                self._link.close()
                return
            asked, asked_at = asked + 1, now
            self._ask()

    def _ask(self) -> None:
        """Send a question to which any server answers, if only that it does not know it."""
        if self._is_asking:
            return
        self._is_asking = True
        # In a thread of its own: with a full buffer to a dead peer it waits for ever.
        threading.Thread(target=self._send, daemon=True).start()

    def _send(self) -> None:
        message = Message()
        message.add_byte(cMSG_GLOBAL_REQUEST)
        message.add_string("keepalive@openssh.com")
        message.add_boolean(True)
        try:
            self._link._send_user_message(message)
        except BROKEN:
            # The thread that reads finds out, too, and says why.
            return
        finally:
            self._is_asking = False
