"""cluster/login/watchdog.py: a peer that answers is kept, one that does not is given up."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from cluster.login.watchdog import Watchdog
from tests.waiting import HANGS_AFTER_S


class Far:
    """A link whose other side answers some questions, and then none."""

    def __init__(self, answers: int) -> None:
        self.asked = 0
        self.closed = threading.Event()
        self._answers = answers

    def is_active(self) -> bool:
        return not self.closed.is_set()

    def close(self) -> None:
        self.closed.set()

    def global_request(self, kind: str) -> None:
        assert kind == "keepalive@openssh.com"
        self.asked += 1
        if self.asked > self._answers:
            self.closed.wait()


@pytest.mark.parametrize("answers", [0, 5])
def test_the_first_question_without_an_answer_ends_the_link(answers: int) -> None:
    far = Far(answers)
    dog = Watchdog(cast(Any, far), "farm", 0.01, 3)
    assert far.closed.wait(HANGS_AFTER_S)
    assert far.asked == answers + 1
    assert dog.verdict == "no answer from farm for 0 s"


def test_one_that_was_stopped_gives_nobody_up() -> None:
    far = Far(1000)
    dog = Watchdog(cast(Any, far), "farm", 1000, 3)
    dog.is_over.set()
    for thread in threading.enumerate():
        if thread.name == "watch farm":
            thread.join()
    assert (far.asked, dog.verdict) == (0, "")
