"""known_hosts, read as OpenSSH reads it, and added to line by line (man sshd, SSH_KNOWN_HOSTS)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.login import patterns

MARKERS = (b"@cert-authority", b"@revoked")
HASHED = b"|1|"
KINDS = re.compile(
    rb"ssh-(ed25519|rsa|dss)|ecdsa-sha2-nistp(256|384|521)"
    rb"|sk-(ssh-ed25519|ecdsa-sha2-nistp256)@openssh\.com"
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line that names the host."""

    where: str
    """FILE:LINE."""
    kind: str
    """The type of its key, such as ssh-ed25519."""
    blob: bytes


@dataclass(frozen=True, kw_only=True)
class Known:
    """All that the files say of a host."""

    keys: list[Entry] = field(default_factory=list)
    portless: list[Entry] = field(default_factory=list)
    """Keys of the name without its port, of which ssh thinks only where `keys` has none."""
    authorities: list[Entry] = field(default_factory=list)
    """Also those of the name without its port, which ssh asks where none with it has signed."""
    revoked: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """FILE:LINE: WHAT, for lines that name the host and cannot be honoured."""


def read(files: Iterable[str], name: str, portless: str = "") -> Known:
    """Return what the files say of a host.

    Args:
        files: those that do not exist say nothing.
        name: the host as known_hosts names it, in lower case: a name, or [name]:port.
        portless: the name without its port, where `name` has one; empty otherwise.

    Raises:
        OSError: a file is there and cannot be read.
    """
    found = Known()
    named, portless_name = (text.encode(errors="surrogateescape") for text in (name, portless))
    for file in dict.fromkeys(files):
        try:
            lines = Path(file).read_bytes().split(b"\n")
        except FileNotFoundError:
            continue
        for number, line in enumerate(lines, 1):
            # To OpenSSH, in C, a line ends at a zero byte.
            text = line.split(b"\0")[0].strip(b" \t\r")
            if text and not text.startswith(b"#"):
                _take(found, f"{file}:{number}", text, named, portless_name)
    return found


def _take(found: Known, where: str, text: bytes, name: bytes, portless: bytes) -> None:
    words = re.split(rb"[ \t]+", text)
    marker = words.pop(0) if words[0].startswith(b"@") else b""
    if not words:
        return
    names = words.pop(0)
    is_named = is_for(name, names)
    if not is_named and not (portless and is_for(portless, names)):
        return
    if marker and marker not in MARKERS:
        shown = marker.decode(errors="replace")
        found.notes.append(f"{where}: '{shown}' is a marker that is not known here; left out")
        return
    key = _key(words)
    if key is None:
        found.notes.append(f"{where}: its key cannot be read; left out")
        return
    entry = Entry(where=where, kind=key[0], blob=key[1])
    if marker == b"@revoked":
        found.revoked.append(entry)
    elif marker == b"@cert-authority":
        found.authorities.append(entry)
    else:
        (found.keys if is_named else found.portless).append(entry)


def is_for(name: bytes, names: bytes) -> bool:
    """Return whether the first field of a line, plain or hashed, names a host."""
    if names.startswith(HASHED):
        salt = names[len(HASHED) :].partition(b"|")[0]
        try:
            return hmac.compare_digest(hashed(name, base64.b64decode(salt, validate=True)), names)
        except binascii.Error:
            return False
    return patterns.matches_any(name, names.lower().split(b","))


def hashed(name: bytes, salt: bytes) -> bytes:
    """Return a name as HashKnownHosts writes it."""
    digest = hmac.digest(salt, name, "sha1")
    return HASHED + base64.b64encode(salt) + b"|" + base64.b64encode(digest)


def _key(words: list[bytes]) -> tuple[str, bytes] | None:
    if len(words) < 2 or not KINDS.fullmatch(words[0]):
        return None
    try:
        blob = base64.b64decode(words[1], validate=True)
    except binascii.Error:
        return None
    head = len(words[0]).to_bytes(4, "big") + words[0]
    # What another decoder may read in another way is not taken.
    if base64.b64encode(blob) != words[1] or not blob.startswith(head):
        return None
    return words[0].decode(), blob


def add(file: str, name: str, kind: str, blob: bytes, *, is_hashed: bool) -> None:
    """Append a host's key to a file, which is made if need be; what is in it stays as it is.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(file)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    named = name.encode(errors="surrogateescape")
    first = hashed(named, secrets.token_bytes(hashlib.sha1().digest_size)) if is_hashed else named
    line = b" ".join([first, kind.encode(), base64.b64encode(blob)]) + b"\n"
    # One write at the end, so that two commands at once cannot mix their lines.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b", buffering=0) as stream:
        if path.is_file() and stream.seek(0, os.SEEK_END) > 0:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                line = b"\n" + line
        stream.write(line)


def fingerprint(blob: bytes) -> str:
    """Return a key's fingerprint as ssh-keygen -l shows it."""
    digest = base64.b64encode(hashlib.sha256(blob).digest()).decode()
    return f"SHA256:{digest.rstrip('=')}"
