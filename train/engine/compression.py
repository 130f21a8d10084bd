"""The bytes of a file, compressed or not, and the shell command that rewrites it in place."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any, cast

from runfolder.errors import UserError

# For each suffix, the program that compresses and decompresses it in a pipe.
PROGRAMS = {
    ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".lzma": "lzma", ".zst": "zstd", ".lz4": "lz4",
}  # fmt: skip


def _open_with_arrow(file: Path) -> IO[bytes]:
    import pyarrow

    codec = {".zst": "zstd", ".lz4": "lz4"}[file.suffix.lower()]
    stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), codec)
    return io.BufferedReader(stream)


_OPEN: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".zst": _open_with_arrow,
    ".lz4": _open_with_arrow,
}


def is_compressed(file: Path) -> bool:
    """Return whether `opened` decompresses a file, by its suffix."""
    return file.suffix.lower() in PROGRAMS


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for its bytes, decompressed.

    Raises:
        UserError: it cannot be read, or is damaged; also during reading.
    """
    try:
        with cast("IO[bytes]", _OPEN.get(file.suffix.lower(), _open)(file)) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(file, error) from None
    except OSError as error:
        # Errors of the system have an errno; those of gzip, bz2 and Arrow do not.
        if error.errno is None:
            raise _damaged(file, error) from None
        raise unreadable(file, error) from None


def unreadable(file: Path, error: OSError) -> UserError:
    """Return the error for a file that the system cannot open or read."""
    # Not strerror: in Arrow's errors it repeats the file name.
    reason = os.strerror(error.errno) if error.errno else str(error)
    return UserError(f"{file}: cannot be read: {reason}")


def rewrite_command(file: Path, program: str) -> str:
    """Return the shell command that pipes a file through `program` and keeps the original.

    `program` reads standard input and writes standard output.
    """
    name, original = shlex.quote(str(file)), shlex.quote(str(_unused(file)))
    if packer := PROGRAMS.get(file.suffix.lower()):
        pipe = f"{packer} -dc < {original} | {program} | {packer} -c > {name}"
    else:
        pipe = f"{program} < {original} > {name}"
    return f"mv {name} {original} && {pipe}"


def _unused(file: Path) -> Path:
    """Return a name for the original; an earlier one is not overwritten."""
    names = (Path(f"{file}.orig{number or ''}") for number in count())
    return next(name for name in names if not name.exists())


def _open(file: Path) -> IO[bytes]:
    return file.open("rb")


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file}: is truncated or damaged, or not a {file.suffix} file ({error}); copy it again"
    )
