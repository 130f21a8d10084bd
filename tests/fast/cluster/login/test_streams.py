"""cluster/login/streams.py: what is moved when others are quicker, or gone."""

from __future__ import annotations

import os
import threading
from typing import Any, cast

import paramiko
import pytest

from cluster.login.session import _Session
from cluster.login.streams import PENDING_BYTES, Streams
from tests.waiting import HANGS_AFTER_S, wait_until


class Far:
    """A channel whose program says something, and takes what it is given when it is let."""

    def __init__(self, output: bytes = b"", errors: bytes = b"") -> None:
        self._output, self._errors = [output], [errors]
        self.taken = b""
        self.takes = threading.Event()
        self.is_closed = threading.Event()

    def recv(self, size: int) -> bytes:
        return self._output.pop() if self._output else b""

    def recv_stderr(self, size: int) -> bytes:
        return self._errors.pop() if self._errors else b""

    def recv_exit_status(self) -> int:
        return 0

    def sendall(self, data: bytes) -> None:
        self.takes.wait()
        self.taken += data

    def resize_pty(self, *size: int) -> None:
        raise paramiko.SSHException("Channel is not open")

    def close(self) -> None:
        self.is_closed.set()


def streams_of(far: Far, rung: threading.Event) -> Streams:
    made = Streams(cast(Any, far), rung.set)
    made.start()
    return made


def test_what_a_program_that_has_ended_said_is_written_before_it_is_over(
    capfd: pytest.CaptureFixture[str],
) -> None:
    rung = threading.Event()
    streams = streams_of(Far(b"out", b"err"), rung)
    assert rung.wait(HANGS_AFTER_S) and streams.is_over
    assert capfd.readouterr() == ("out", "err")


def test_input_is_held_back_while_the_far_side_takes_none_and_goes_on_then() -> None:
    far, rung = Far(), threading.Event()
    streams = streams_of(far, rung)
    assert rung.wait(HANGS_AFTER_S)
    rung.clear()
    given = os.urandom(PENDING_BYTES)
    streams.send(given)
    assert not streams.has_room
    far.takes.set()
    assert rung.wait(HANGS_AFTER_S) and streams.has_room
    assert far.taken == given


def test_a_size_that_the_far_side_does_not_want_ends_nothing() -> None:
    far = Far()
    streams = streams_of(far, threading.Event())
    far.takes.set()
    streams.resize(os.terminal_size((80, 24)))
    streams.send(b"x")
    streams.close()
    assert far.is_closed.wait(HANGS_AFTER_S)
    assert far.taken == b"x"


def test_a_writer_that_shares_the_descriptor_may_set_it_not_to_block() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    far, sent = Far(bytes(1 << 20)), threading.Event()
    streams = Streams(cast(Any, far), sent.set)
    thread = threading.Thread(target=streams._write, args=(far.recv, writer))
    thread.start()
    found = 0
    while found < 1 << 20:
        found += len(os.read(reader, 1 << 16))
    thread.join()
    os.close(reader)
    os.close(writer)


def test_input_that_somebody_else_has_read_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(fd: int, size: int) -> bytes:
        raise BlockingIOError

    monkeypatch.setattr(os, "read", read)
    assert _Session._read(cast(Any, None))


def test_who_waits_is_woken_when_nobody_reads_the_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(fd: int, data: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", write)
    rung = threading.Event()
    streams = streams_of(Far(b"out", b"err"), rung)
    wait_until(lambda: streams.is_broken, "the broken pipe", every_s=0.01)
    assert rung.wait(HANGS_AFTER_S)
