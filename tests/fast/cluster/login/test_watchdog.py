"""cluster/login/watchdog.py: how long a silence may last, by a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.login import watchdog
from cluster.login.watchdog import Watchdog

INTERVAL_S = 15


class World:
    """Clock, link and threads: a wait is over at once, a thread runs where it is started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, heard: Callable[[World], None]) -> None:
        self.now = 100.0
        self.last_heard = 100.0
        self.asked_at: list[float] = []
        self.is_closed = False
        self.is_over = False
        self._heard = heard
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: self.now))
        threads = SimpleNamespace(
            Event=lambda: SimpleNamespace(wait=self._wait),
            Thread=lambda target, **_: SimpleNamespace(start=target),
        )
        monkeypatch.setattr(watchdog, "threading", threads)
        self.verdict = Watchdog(cast(Any, self), "farm", INTERVAL_S, 3).verdict

    def _wait(self, seconds: float) -> bool:
        self.now += seconds
        self._heard(self)
        return self.is_over

    # ---- the link ----

    def is_active(self) -> bool:
        return not self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def _send_user_message(self, message: Any) -> None:
        assert b"keepalive@openssh.com" in message.asbytes()
        self.asked_at.append(self.now)


def test_a_silence_is_asked_about_three_times_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, lambda world: None)
    assert world.asked_at == [115, 130, 145]
    assert world.is_closed and world.now == 160
    assert world.verdict == "no answer from farm for 60 s"


def test_an_answer_to_each_question_keeps_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(world: World) -> None:
        if world.asked_at:
            world.last_heard = world.asked_at[-1] + 1
        world.is_over = world.now > 10_000

    world = World(monkeypatch, answer)
    assert not world.is_closed and world.verdict is None
    assert len(world.asked_at) > 500


def test_a_server_that_speaks_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def speak(world: World) -> None:
        world.last_heard = world.now - 1
        world.is_over = world.now > 10_000

    assert World(monkeypatch, speak).asked_at == []
