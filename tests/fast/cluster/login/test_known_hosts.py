"""cluster/login/known_hosts.py: as ssh-keygen finds keys; without it plain lines, or a refusal."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramiko
import pytest

from cluster.login import known_hosts
from runfolder.errors import UserError

KEY, OTHER = (paramiko.ECDSAKey.generate() for _ in range(2))
LINE = f"{KEY.get_name()} {KEY.get_base64()}"
OTHER_LINE = f"{OTHER.get_name()} {OTHER.get_base64()}"
HASHED = paramiko.HostKeys.hash_host("farm")


@pytest.fixture
def no_keygen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_hosts.shutil, "which", lambda name: None)


def find(folder: Path, text: str, name: str = "farm") -> list[known_hosts.Entry]:
    path = folder / "known_hosts"
    path.write_text(text)
    return known_hosts.find([str(path), str(path), f"{path}.not"], name)


@pytest.mark.needs("sshd")
def test_markers_names_and_patterns_are_told_apart(tmp_path: Path) -> None:
    found = find(
        tmp_path,
        f"# comment\n\nfarm,other {LINE} a comment\n{HASHED} {LINE}\n@revoked * {OTHER_LINE}\n"
        f"@cert-authority *arm\t{OTHER_LINE}\n*,!farm {OTHER_LINE}\n[farm]:2222 {OTHER_LINE}\n"
        f"@trusted farm {LINE}\nfarm ssh-frog AAAA\nfarm\n",
    )
    assert [(entry.where.rpartition(":")[2], entry.marker) for entry in found] == [
        ("3", ""),
        ("4", ""),
        ("5", "REVOKED"),
        ("6", "CA"),
    ]
    blobs = [KEY.asbytes()] * 2 + [OTHER.asbytes()] * 2
    assert [entry.blob for entry in found] == blobs
    assert {entry.kind for entry in found} == {"ecdsa-sha2-nistp256"}
    assert [entry.blob for entry in find(tmp_path, f"farm {LINE}\n", "[farm]:2222")] == []


def test_plain_lines_are_read_without_ssh_keygen(tmp_path: Path, no_keygen: None) -> None:
    text = f"# *\nfarm,other {LINE}\nelsewhere {OTHER_LINE}\n[farm]:2222 {OTHER_LINE}\n"
    assert [entry.blob for entry in find(tmp_path, text)] == [KEY.asbytes()]
    assert [entry.blob for entry in find(tmp_path, text, "[farm]:2222")] == [OTHER.asbytes()]
    assert [entry.blob for entry in find(tmp_path, f"{HASHED} {LINE}\n")] == [KEY.asbytes()]


@pytest.mark.parametrize("names", ["@revoked farm", "@cert-authority farm", "f*", "farm,!x"])
def test_what_is_not_plain_is_refused_without_ssh_keygen(
    tmp_path: Path, no_keygen: None, names: str
) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}/known_hosts:2: "):
        find(tmp_path, f"farm {LINE}\n{names} {LINE}\n")


def add(path: Path, name: str = "farm", *, is_hashed: bool = False) -> None:
    known_hosts.add(str(path), name, KEY, is_hashed=is_hashed)


def test_a_key_is_appended_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "known_hosts"
    add(path)
    assert path.read_text() == f"farm {LINE}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.write_bytes(b"\xff broken \0 line without an end")
    add(path)
    assert path.read_bytes() == f"\udcff broken \0 line without an end\nfarm {LINE}\n".encode(
        errors="surrogateescape"
    )
    add(Path("/dev/null"))


class Slow:
    """A file that another writes to before this one's only write."""

    def __init__(self, file: Any, another: Callable[[], None]) -> None:
        self._file = file
        self._another = another

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._another()
        self._file.write(data)


def test_two_that_add_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "known_hosts"
    path.write_text("# mine\n")
    real = os.fdopen

    def open_slow(*words: Any, **options: Any) -> Slow:
        monkeypatch.setattr(os, "fdopen", real)
        return Slow(real(*words, **options), lambda: add(path, "other"))

    monkeypatch.setattr(os, "fdopen", open_slow)
    add(path)
    assert path.read_text() == f"# mine\nother {LINE}\nfarm {LINE}\n"
