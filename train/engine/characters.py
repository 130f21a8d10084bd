"""Read files as UTF-8 text; reject other encodings with the command that converts the file."""

from __future__ import annotations

import codecs
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from runfolder.errors import UserError
from train.engine.compression import opened, rewrite_command

_PIECE = 64 * 1024
# The longer BOM first: the UTF-32 one begins with the UTF-16 one.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_MAGIC = (
    (b"\x1f\x8b", ".gz"),
    (b"BZh", ".bz2"),
    (b"\xfd7zXZ", ".xz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
)
_UTF8_SEQUENCE = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)


def read(file: Path) -> Iterator[str]:
    """Yield a file's text with every byte, line endings too, so that bits per byte are correct.

    Only a byte order mark (BOM) at the start is dropped, as it is not text.

    Raises:
        UserError: it is not UTF-8 text, with the line; or as `compression.opened`.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with opened(file) as stream:
        data = b"first"
        while data:
            data = stream.read(_PIECE)
            try:
                stretch = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise _not_utf8(file, line, error.object) from None
            if "\x00" in stretch:
                line += stretch[: stretch.index("\x00")].count("\n")
                raise _zero_byte(file, line)
            line += stretch.count("\n")
            yield stretch


def refusal(file: Path) -> UserError:
    """Return what is wrong with a file that was found not to be UTF-8 text, with the line."""
    try:
        for _ in read(file):
            pass
    except UserError as error:
        return error
    return UserError(f"{file}: changed while it was read; run it again")


def _zero_byte(file: Path, line: int) -> UserError:
    if encoding := _wide_encoding(_head(file)):
        return _convert(file, line, encoding)
    return UserError(f"{file}:{line}: is not text: it contains a null byte")


def _wide_encoding(head: bytes) -> str | None:
    """Guess the multi-byte encoding that a file begins in, or return None."""
    if encoding := next((name for mark, name in _MARKS if head.startswith(mark)), None):
        return encoding
    evens, odds = head[::2].count(0), head[1::2].count(0)
    # Without a BOM: a Latin letter has a zero byte before or after it.
    if max(evens, odds) > len(head) / 5 and min(evens, odds) < max(evens, odds) / 4:
        return "UTF-16LE" if odds > evens else "UTF-16BE"
    return None


def _not_utf8(file: Path, line: int, around: bytes) -> UserError:
    head = _head(file)
    if encoding := _wide_encoding(head):
        return _convert(file, line, encoding)
    if suffix := next((suffix for magic, suffix in _MAGIC if head.startswith(magic)), None):
        name = shlex.quote(file.name + suffix)
        return UserError(f"{file}:{line}: is compressed, not text; rename it to {name}")
    # A truncated file ends in a piece of a few bytes.
    around = head + around
    high = sum(byte >= 0x80 for byte in around)
    valid = sum(len(found) for found in _UTF8_SEQUENCE.findall(around))
    if valid > high / 2:
        return UserError(
            f"{file}:{line}: is not UTF-8 text, unlike the text around it; fix that line, or "
            f"drop the invalid bytes: {_command(file, '-c -f UTF-8')}"
        )
    # In the languages that cp1252 is made for, at most one letter in five has an accent.
    if high < len(around) / 5 and _is_cp1252(around):
        return _convert(file, line, "WINDOWS-1252")
    return UserError(
        f"{file}:{line}: is not UTF-8 text; find out its encoding (`file -i {_quoted(file)}` "
        "guesses) and convert it with iconv -f ENCODING -t UTF-8"
    )


def _convert(file: Path, line: int, encoding: str) -> UserError:
    return UserError(
        f"{file}:{line}: is not UTF-8 text (it looks like {encoding}); convert it: "
        + _command(file, f"-f {encoding}")
    )


def _command(file: Path, options: str) -> str:
    return rewrite_command(file, f"iconv {options} -t UTF-8")


def _quoted(file: Path) -> str:
    return shlex.quote(str(file))


def _head(file: Path) -> bytes:
    with opened(file) as stream:
        return stream.read(4096)


def _is_cp1252(data: bytes) -> bool:
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return False
    return True
