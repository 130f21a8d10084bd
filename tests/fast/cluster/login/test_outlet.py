"""cluster/login/outlet.py: nothing is lost, nothing waits, the descriptor stays as it was."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import socket
import tty
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.login.outlet import Outlet
from tests.waiting import HANGS_AFTER_S

Pair = tuple[int, int]


def a_pipe() -> Pair:
    return os.pipe()


def a_terminal() -> Pair:
    reader, writer = pty.openpty()
    tty.setraw(writer)
    return reader, writer


def a_socket() -> Pair:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


@pytest.mark.parametrize(
    ("make", "can_reopen"),
    [(a_pipe, True), (a_pipe, False), (a_terminal, True), (a_socket, True)],
)
def test_what_finds_no_room_is_kept_and_comes_later(
    make: Callable[[], Pair], can_reopen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_reopen:
        monkeypatch.setattr(os, "open", refuse)
    reader, writer = make()
    flags = fcntl.fcntl(writer, fcntl.F_GETFL)
    seen: list[bytes] = []
    outlet = Outlet(writer, seen.append)
    data = b"".join(b"%07d\n" % number for number in range(100_000))
    written = outlet.put(data)
    assert 0 < written < len(data) and outlet.is_waiting
    assert outlet.put(b"the end\n") == 0
    found = b""
    while len(found) < len(data) + 8:
        found += os.read(reader, 1 << 16)
        if outlet.is_waiting and select.select([], [outlet.fd], [], 0)[1]:
            written += outlet.flush()
    assert found == data + b"the end\n" == b"".join(seen)
    assert written == len(found)
    assert fcntl.fcntl(writer, fcntl.F_GETFL) == flags
    outlet.close()
    os.write(writer, b"still open")
    os.close(reader)
    os.close(writer)


def test_what_is_held_comes_when_it_is_released_and_before_what_comes_then() -> None:
    reader, writer = a_terminal()
    seen: list[bytes] = []
    outlet = Outlet(writer, seen.append)
    outlet.hold()
    assert outlet.put(b"first ") == 0
    assert not select.select([reader], [], [], 0)[0] and seen == []
    outlet.release()
    assert outlet.is_waiting
    assert outlet.put(b"second") == 0
    assert outlet.flush() == len(b"first second")
    # A terminal may hand over in two parts what came in two.
    assert os.read(reader, 6) + os.read(reader, 100) == b"first second" == b"".join(seen)
    assert outlet.put(b"!") == 1 and not outlet.is_waiting


def refuse(*_: object) -> int:
    raise PermissionError


def test_a_file_is_appended_to_where_its_writer_stood(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        file.write(b"before\n")
        outlet = Outlet(file.fileno())
        assert outlet.put(b"after\n") == 6
        outlet.close()
    assert (tmp_path / "file").read_bytes() == b"before\nafter\n"


@pytest.mark.parametrize("make", [a_pipe, a_socket])
def test_a_reader_that_left_is_noted(make: Callable[[], Pair]) -> None:
    reader, writer = make()
    outlet = Outlet(writer)
    os.close(reader)
    assert outlet.put(b"x" * 100) == 100
    assert isinstance(outlet.broken, BrokenPipeError)
    assert not outlet.is_waiting
    assert outlet.put(b"more") == 4
    outlet.close()
    os.close(writer)


def test_what_is_dropped_when_the_reader_leaves_is_done_with() -> None:
    reader, writer = a_pipe()
    outlet = Outlet(writer)
    data = b"x" * 200_000
    done = outlet.put(data) + outlet.put(data)
    assert done < len(data) and outlet.is_waiting
    os.close(reader)
    # Else the server waits for it to be taken.
    assert done + outlet.flush() == 2 * len(data)
    assert isinstance(outlet.broken, BrokenPipeError)
    outlet.close()
    os.close(writer)


def test_the_last_takes_the_place_of_what_waits() -> None:
    reader, writer = a_pipe()
    outlet = Outlet(writer)
    outlet.put(b"x" * 200_000)
    assert not outlet.finish(b"the end", 0.01)
    with ThreadPoolExecutor() as pool:
        finished = pool.submit(outlet.finish, b"the end", HANGS_AFTER_S)
        found = b""
        while not finished.done():
            if select.select([reader], [], [], 0.01)[0]:
                found += os.read(reader, 1 << 10)
    assert finished.result()
    assert outlet.put(b"more") == 4 and not outlet.is_waiting
    os.close(writer)
    outlet.close()
    while not found.endswith(b"end"):
        found += os.read(reader, 1 << 16)
    assert len(found) < 200_000
    os.close(reader)
