"""What the known_hosts files say about a host, as `ssh-keygen -F` finds it; and adding a line.

Without ssh-keygen Paramiko reads plain lines; a line that it would misread is refused.
"""

from __future__ import annotations

import base64
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import paramiko

from runfolder.errors import UserError

FOUND = re.compile(r"# Host .* found: line (?P<number>\d+) ?(?P<marker>|CA|REVOKED)")
TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line that names the host."""

    where: str
    """FILE:LINE; only the file if Paramiko has read it."""
    marker: str = ""
    """CA or REVOKED, if it has one."""
    kind: str
    """The type of its key, such as ssh-ed25519."""
    blob: bytes


def find(files: Iterable[str], name: str) -> list[Entry]:
    """Return the lines for a host, whose name is in lower case: a name, or [name]:port.

    Raises:
        UserError: a file exists and cannot be read, or cannot be parsed without ssh-keygen.
    """
    found: list[Entry] = []
    for file in dict.fromkeys(files):
        try:
            Path(file).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; it may revoke keys") from None
        found += _by_keygen(file, name) if shutil.which("ssh-keygen") else _by_paramiko(file, name)
    return found


def _by_keygen(file: str, name: str) -> list[Entry]:
    done = subprocess.run(
        ["ssh-keygen", "-F", name, "-f", file],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=TIMEOUT_S,
        check=False,
    )
    # It prints nothing if it finds nothing.
    if done.returncode and (said := done.stderr.strip()):
        raise UserError(f"ssh-keygen -F {name} -f {file}: {said}")
    lines = done.stdout.splitlines()
    entries = []
    for comment, line in itertools.pairwise(lines):
        if found := FOUND.fullmatch(comment):
            words = line.split()
            words = words[1:] if found["marker"] else words
            where = f"{file}:{found['number']}"
            blob = base64.b64decode(words[2])
            entries.append(Entry(where=where, marker=found["marker"], kind=words[1], blob=blob))
    return entries


def _by_paramiko(file: str, name: str) -> list[Entry]:
    with Path(file).open(errors="surrogateescape") as stream:
        for number, line in enumerate(stream, 1):
            names = line.split(maxsplit=1)[0] if line.strip() else "#"
            if names.startswith("@") or re.search(r"[*?!]", names):
                raise UserError(
                    f"{file}:{number}: markers and patterns are not supported without ssh-keygen; "
                    "install the OpenSSH client"
                )
    keys = paramiko.HostKeys()
    try:
        keys.load(file)
    except (paramiko.hostkeys.InvalidHostKey, ValueError):
        raise UserError(f"{file}: a line cannot be parsed without ssh-keygen") from None
    found = keys.lookup(name) or {}
    return [Entry(where=file, kind=kind, blob=key.asbytes()) for kind, key in dict(found).items()]


def add(file: str, name: str, key: paramiko.PKey, *, is_hashed: bool) -> None:
    """Append a host's key to a file, or raise an OSError; the rest of it is unchanged."""
    path = Path(file)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    named = paramiko.HostKeys.hash_host(name) if is_hashed else name
    line = f"{named} {key.get_name()} {key.get_base64()}\n".encode(errors="surrogateescape")
    # One write at the end, so that two commands at once cannot mix their lines.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b", buffering=0) as stream:
        if path.is_file() and stream.seek(0, os.SEEK_END) > 0:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                line = b"\n" + line
        stream.write(line)
