"""known_hosts: what ssh-keygen finds we find, and nothing else; any bytes are read."""

from __future__ import annotations

import base64
import fnmatch
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from cluster.login import known_hosts, patterns

KEY = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(range(32))).decode()
OTHER = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(32)).decode()
HASHED = known_hosts.hashed(b"farm", bytes(20)).decode()
HASHED_PORT = known_hosts.hashed(b"[farm]:2222", bytes(range(20))).decode()


def read(folder: Path, text: str, name: str = "farm", portless: str = "") -> known_hosts.Known:
    path = folder / "known_hosts"
    path.write_text(text)
    return known_hosts.read([str(path)], name, portless)


def test_markers_and_names_are_told_apart(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        f"# comment\n\nfarm,other ssh-ed25519 {KEY} a comment\n{HASHED} ssh-ed25519 {KEY}\n"
        f"@revoked * ssh-ed25519 {OTHER}\n@cert-authority *arm\tssh-ed25519\t{OTHER}\n"
        f"*,!farm ssh-ed25519 {OTHER}\n{HASHED_PORT} ssh-ed25519 {OTHER}\n",
    )
    path = tmp_path / "known_hosts"
    assert [entry.where for entry in found.keys] == [f"{path}:3", f"{path}:4"]
    assert [entry.where for entry in found.revoked] == [f"{path}:5"]
    assert [entry.where for entry in found.authorities] == [f"{path}:6"]
    assert found.notes == []


def test_a_name_without_its_port_counts_apart(tmp_path: Path) -> None:
    text = f"farm ssh-ed25519 {KEY}\n[farm]:2222 ssh-ed25519 {OTHER}\n"
    found = read(tmp_path, text, "[farm]:2222", "farm")
    assert [entry.blob for entry in found.keys] == [base64.b64decode(OTHER)]
    assert [entry.blob for entry in found.portless] == [base64.b64decode(KEY)]


@pytest.mark.parametrize(
    "line",
    [
        f"@trusted farm ssh-ed25519 {KEY}",
        f"farm ssh-frog {KEY}",
        f"farm ssh-rsa {KEY}",
        f"farm ssh-ed25519 {KEY[:-2]}",
        "farm ssh-ed25519",
        "farm 1024 35 1234567890",
        f"@revoked farm ssh-ed25519 {KEY}x",
        f"@revoked @cert-authority ssh-ed25519 {KEY}",
    ],
)
def test_what_cannot_be_honoured_is_noted_and_counts_for_nothing(tmp_path: Path, line: str) -> None:
    found = read(tmp_path, f"{line}\n")
    assert not (found.keys or found.revoked or found.authorities)
    is_for_another = "@cert-authority" in line
    assert len(found.notes) == (0 if is_for_another else 1)
    assert is_for_another or found.notes[0].startswith(f"{tmp_path}/known_hosts:1: ")


def test_a_key_is_appended_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "known_hosts"
    known_hosts.add(str(path), "farm", "ssh-ed25519", b"abc", is_hashed=False)
    assert path.read_bytes() == b"farm ssh-ed25519 YWJj\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.write_bytes(b"\xff broken \0 line without an end")
    known_hosts.add(str(path), "farm", "ssh-ed25519", b"abc", is_hashed=False)
    assert path.read_bytes() == (b"\xff broken \0 line without an end\nfarm ssh-ed25519 YWJj\n")
    known_hosts.add("/dev/null", "farm", "ssh-ed25519", b"abc", is_hashed=False)


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

    def add(name: str) -> None:
        known_hosts.add(str(path), name, "ssh-ed25519", b"abc", is_hashed=False)

    def open_slow(*words: Any, **options: Any) -> Slow:
        monkeypatch.setattr(os, "fdopen", real)
        return Slow(real(*words, **options), lambda: add("other"))

    monkeypatch.setattr(os, "fdopen", open_slow)
    add("farm")
    assert path.read_text() == "# mine\nother ssh-ed25519 YWJj\nfarm ssh-ed25519 YWJj\n"


# ---- hostile ----

NAMES = st.lists(
    st.sampled_from(
        (
            *("farm", "FARM", "far?", "*", "*m", "!farm", "!*", "f*a*m", "[farm]:2222", "[*]:*"),
            *("other", "", "é", "|1|", "far", "farmm"),
        )
    ),
    min_size=1,
    max_size=3,
).map(",".join)
LINE = st.builds(
    lambda *parts: "".join(parts),
    st.sampled_from([""] * 12 + [" ", "\t", "#"]),
    st.sampled_from([""] * 4 + ["@revoked ", "@revoked\t", "@cert-authority ", "@frog ", "@"]),
    st.one_of(NAMES, st.sampled_from([HASHED, HASHED_PORT, HASHED[:-3], f"{HASHED},farm"])),
    st.sampled_from([" "] * 9 + ["\t", "  ", "\x0c", ""]),
    st.sampled_from(["ssh-ed25519"] * 12 + ["ssh-rsa", "ssh-frog", "1024", ""]),
    st.sampled_from([" "] * 8 + ["\t", "\x00"]),
    st.sampled_from([KEY] * 8 + [OTHER, KEY[:-1], f"{KEY}=", "AAAA", ""]),
    st.sampled_from([""] * 8 + [" comment", "\r", "\x00x", "x"]),
)


# Each line counts by itself, and many are asked about at once.
@pytest.mark.needs("sshd")
@given(st.lists(LINE, min_size=40, max_size=60), st.sampled_from(["farm", "[farm]:2222"]))
@example([f"farm ssh-ed25519 {KEY}"], "farm")
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_we_find_no_key_that_ssh_keygen_does_not(
    tmp_path: Path, lines: list[str], name: str
) -> None:
    compare(tmp_path, lines, name)


def compare(folder: Path, lines: list[str], name: str) -> None:
    """Check that what is found is what ssh-keygen finds, or less; of what is revoked, or more."""
    text = "\n".join(lines) + "\n"
    found = read(folder, text, name)
    # With -l it reads the keys, too.
    find = ["ssh-keygen", "-l", "-F", name, "-f", str(folder / "known_hosts")]
    done = subprocess.run(find, check=False, capture_output=True, text=True, errors="replace")
    theirs: dict[str, set[int]] = {"": set(), "REVOKED": set(), "CA": set()}
    for line in done.stdout.splitlines():
        words = line.split()
        if line.startswith("# Host ") and words[3:5] == ["found:", "line"]:
            theirs[words[6] if len(words) > 6 else ""].add(int(words[5]))
    ours = {
        marker: {int(entry.where.rpartition(":")[2]) for entry in entries}
        for marker, entries in (("", found.keys), ("CA", found.authorities))
    }
    for marker, found_lines in ours.items():
        event(f"{marker or 'key'} found: {bool(found_lines)}")
    assert ours[""] <= theirs[""]
    assert ours["CA"] <= theirs["CA"]
    # What it takes for revoked is revoked.
    revoked = {int(entry.where.rpartition(":")[2]) for entry in found.revoked}
    assert theirs["REVOKED"] <= revoked


@given(st.binary(max_size=300), st.sampled_from(["farm", "[farm]:22"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read(tmp_path: Path, data: bytes, name: str) -> None:
    path = tmp_path / "known_hosts"
    path.write_bytes(data)
    found = known_hosts.read([str(path)], name, "farm")
    assert not found.keys


@given(st.text("ab*?", max_size=12), st.text("ab", max_size=12))
def test_patterns_are_those_of_a_shell(pattern: str, text: str) -> None:
    expected = fnmatch.fnmatchcase(text, pattern)
    assert patterns.matches(text.encode(), pattern.encode()) == expected


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    assert not patterns.matches(b"a" * 5000, b"*a" * 200 + b"*b")
