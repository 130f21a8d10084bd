"""cluster/login/session.py: what its loop makes of others that are quicker."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import paramiko
import pytest

from cluster.login import session
from cluster.login.outlet import Outlet
from cluster.login.session import Session
from runfolder.errors import UserError

FAR_SIDE = SimpleNamespace(
    host=SimpleNamespace(alias="server"), transport=SimpleNamespace(), lost=None
)


@pytest.fixture
def made() -> Iterator[Session]:
    made = Session(cast(Any, FAR_SIDE), reads_input=False)
    yield made
    made._remote = None
    made.close()


class LastWords:
    """A far side that is over: its last output came at the moment at which that was seen."""

    pending_bytes = 0

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._is_new = True

    @property
    def is_over(self) -> bool:
        if self._is_new:
            self._is_new = False
            self._outlet._kept.append(b"the end")
        return True

    def flush(self) -> None:
        self._outlet.flush()


def test_the_last_output_is_written_though_it_had_to_wait(made: Session) -> None:
    reader, writer = os.pipe()
    made._out.close()
    made._out = Outlet(writer)
    made._remote = cast(Any, LastWords(made._out))
    made._loop([])
    os.close(writer)
    made._out.close()
    assert os.read(reader, 100) == b"the end"
    os.close(reader)


class SlowTerminal:
    """A terminal that becomes raw when all has been shown that is shown too early."""

    def __init__(self, reader: int) -> None:
        self._reader = reader
        self.shown_early = False

    def __enter__(self) -> SlowTerminal:
        self.shown_early = bool(select.select([self._reader], [], [], 0)[0])
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is to be given back."""


def test_the_first_output_waits_for_a_raw_terminal(
    made: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    made._out.close()
    made._out = Outlet(writer)
    terminal = SlowTerminal(reader)

    def start(*_: object, **options: object) -> None:
        # It comes at once.
        made._out.put(b"first\n")
        made._remote = cast(
            Any,
            SimpleNamespace(
                is_over=True,
                was_closed=True,
                pending_bytes=0,
                exit_signal="",
                exit_status=0,
                flush=made._out.flush,
                resize=lambda size: None,
                send_eof=lambda: None,
                close=lambda: None,
            ),
        )

    monkeypatch.setattr(session, "Terminal", lambda fd: terminal)
    monkeypatch.setattr(made, "_start", start)
    monkeypatch.setattr(made, "_resize", lambda: None)
    monkeypatch.setattr(made, "_say", lambda text: None)
    assert made.run(None, tty=True, forward_agent=False) == 0
    assert not terminal.shown_early
    assert os.read(reader, 100) == b"first\n"
    os.close(reader)
    os.close(writer)


def test_input_that_somebody_else_has_read_is_no_end(
    made: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(fd: int, size: int) -> bytes:
        raise BlockingIOError

    monkeypatch.setattr(os, "read", read)
    made._remote = cast(Any, SimpleNamespace())
    assert made._read()


def test_a_link_that_breaks_at_the_start_is_said(
    made: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward_agent(channel: object) -> None:
        raise paramiko.SSHException("Channel is not open")

    connection = SimpleNamespace(
        **vars(FAR_SIDE), open_session=lambda: None, forward_agent=forward_agent
    )
    made._connection = cast(Any, connection)
    monkeypatch.setattr(session, "Remote", lambda *_: None)
    with pytest.raises(UserError, match="server: no session: Channel is not open"):
        made._start("true", None, forward_agent=True)
