"""The names of classes: one name however a file writes it, and no two that look the same."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal

from runfolder.errors import UserError

_WHOLE = re.compile(r"[+-]?\d{1,100}")
# Only with a point: 1e5 may well be a name.
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d{1,2})?")
# What pandas reads as a missing value, in this spelling; many data sets have a class `none`.
_MISSING = ("#N/A", "#NA", "<NA>", "N/A", "NA", "NULL", "None", "n/a", "null")


def class_name(label: object, where: str, column: str) -> str:
    """Return the name of a class: the same of 1, +1, 1.0, "1" and "1.0"; of true and "TRUE".

    Raises:
        UserError: it is missing, or a number with a fraction.
    """
    if label is None or label != label:  # NaN means missing, too
        raise UserError(f"{where}: '{column}' is missing")
    if not isinstance(label, str | int | float | Decimal):
        raise UserError(f"{where}: '{column}' is not a name or a number but {label!r}")
    name = str(label).strip()
    if not name:
        raise UserError(f"{where}: '{column}' is empty")
    if name in _MISSING or name.lower().lstrip("+-") == "nan":
        raise UserError(
            f"{where}: '{column}' is {name}, which means a missing value; leave the row out, "
            "or give the class another name"
        )
    if name.lower() in ("true", "false"):
        return name.lower()
    if _DECIMAL.fullmatch(name):
        number = Decimal(name)
        if number != number.to_integral_value():
            raise UserError(
                f"{where}: '{column}' is {name}, not a class; the labs classify and do not predict "
                "quantities: turn the numbers into classes, or give them names"
            )
        name = str(int(number))
    elif not isinstance(label, str | int):
        raise UserError(f"{where}: '{column}' is {name}, not a class")
    if _WHOLE.fullmatch(name):
        # Leading zeros stay: they may be part of a code.
        digits = name.lstrip("+-")
        name = f"-{digits}" if name[0] == "-" and int(digits) else digits
        if int(name) == -1:
            raise UserError(f"{where}: '{column}' is {name}, which means no class")
    return name


def of_rows(labels: Iterable[str]) -> list[str]:
    """Return the classes of the training rows in order: numbers first, as numbers.

    Raises:
        UserError: there are fewer than two, or a class has too few rows to keep one for validation.
    """
    counts = Counter(labels)
    classes = sorted(counts, key=lambda name: (not name.isdecimal(), name.zfill(12)))
    if len(classes) < 2:
        raise UserError(
            f"data.train: all rows are of one class, '{classes[0]}'; give at least two classes"
        )
    rarest, rows = min(counts.items(), key=lambda pair: pair[1])
    if rows < 2:
        raise UserError(
            f"data.train: class '{rarest}' has a single row, which cannot be trained on and kept "
            "for validation; give it more rows or leave it out"
        )
    _check_distinct(classes)
    if len(classes) > 1000:
        raise UserError(
            f"data.label_column: has {len(classes)} different values; these are not classes"
        )
    return classes


def _check_distinct(classes: list[str]) -> None:
    """Raise `UserError` if two classes look like one that is written in two ways."""
    alike: dict[str, str] = {}
    for name in classes:
        # Spaces, capitals, accents in one character or two, and leading zeros do not count.
        folded = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        folded = str(int(folded)) if _WHOLE.fullmatch(folded) else folded
        other = alike.setdefault(folded, name)
        if other != name:
            raise UserError(
                f"data.label_column: the classes '{other}' and '{name}' differ only in how they "
                "are written; write them the same way, or give them different names"
            )


def listed(classes: list[str]) -> str:
    """Return the first of the classes for a message."""
    return ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
