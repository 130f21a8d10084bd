"""How Slurm writes records, numbers and times."""

from __future__ import annotations

import re
from collections.abc import Mapping


def fields_of(line: str) -> dict[str, str]:
    """Return the KEY=VALUE pairs of a line of `scontrol show --oneliner`; values may have spaces.

    If a key occurs twice, the first counts: what people write (a reason, a comment) comes last, and
    cannot pass for something else.
    """
    _, *parts = re.split(r"(?:^|\s+)([A-Z]\w*(?:/\w+)*)=", line)
    found: dict[str, str] = {}
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        found.setdefault(key, value.strip())
    return found


def number(fields: Mapping[str, str], key: str) -> int | None:
    """Return the whole number that a field holds; None for UNLIMITED and the like."""
    value = fields.get(key, "")
    return int(value) if value.isdecimal() and len(value) < 16 else None


def seconds(time: str) -> int | None:
    """Return a time limit in seconds, None for UNLIMITED.

    Slurm's notations: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes and days-hours:minutes:seconds (man sbatch, --time).

    Raises:
        ValueError: it is in none of these notations.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    if not re.fullmatch(r"(\d+-\d+(:\d\d?){0,2}|\d+(:\d\d?){0,2})", time):
        raise ValueError(f"'{time}' is not a time limit")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:
        hours, minutes, secs = 0, parts[0], (*parts, 0)[1]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs
