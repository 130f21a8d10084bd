"""Findings on a job: what keeps it from running, for now or forever, and what would fit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from cluster.plan.request import Request
from cluster.slurm import notation


class Verdict(IntEnum):
    """What becomes of a job; the numbers are exit codes of `python -m cluster check`."""

    FITS = 0
    WAITS = 1
    NEVER = 2


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that keeps a job from running or, with FITS, that may end it early."""

    verdict: Verdict
    limit: str
    """The limit's name in Slurm: MaxTRESPU gres/gpu."""
    whose: str
    """QOS normal, partition gpu, account research; "" for none."""
    message: str
    """One line: what is wrong, and what to do."""
    fits_with: str = ""
    """The setting that would fit: NODES=2; empty if there is none."""


def never(
    message: str, limit: str, whose: str, choices: list[str] | None = None, setting: str = ""
) -> Finding:
    """Return the finding that a job can never run; the first of `choices` would fit."""
    fits_with = ""
    if choices:
        # A setting of site.toml is written as in that file.
        fits_with = f'{setting} = "{choices[0]}"' if "." in setting else f"{setting}={choices[0]}"
        if choices[0].isdecimal():
            fits_with = fits_with.replace('"', "")
    return Finding(
        verdict=Verdict.NEVER, limit=limit, whose=whose, message=message, fits_with=fits_with
    )


def over_time(request: Request, limit: str, whose: str, name: str) -> Finding | None:
    """Return the finding that a job's time is above a limit, if it is."""
    try:
        most = notation.seconds(limit)
        asked = notation.seconds(request.time)
    except ValueError:
        return None
    if most is None or (asked is not None and asked <= most):
        return None
    return never(
        f"TIME={request.time}: {whose} allows at most {limit}; ask for less: a run saves at "
        "its time limit and continues automatically in the next job",
        name,
        whose,
        [limit],
        "TIME",
    )
