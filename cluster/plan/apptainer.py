"""The apptainer command of this machine, and what to do if there is none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cluster.site.file import load_site, site_of_this_machine
from runfolder.errors import UserError


def find_apptainer() -> str | None:
    """Return the command: $APPTAINER, site.toml's, the one on the PATH, a private copy, or None.

    Raises:
        UserError: $APPTAINER or site.toml names something that is not a command.
    """
    given = os.environ.get("APPTAINER")
    if not given and (named := named_by_site()):
        return named
    found = shutil.which(given or "apptainer")
    if given and found is None:
        raise UserError(f"APPTAINER={given}: is not a command; name one, or unset it")
    found = found or shutil.which(str(_private_apptainer()))
    # It is called from other folders.
    return str(Path(found).absolute()) if found else None


def named_by_site() -> str:
    """Return the command that site.toml names; "" if it names none.

    Raises:
        UserError: it is not a command.
    """
    named = site_of_this_machine().container.apptainer
    if named and shutil.which(named) is None:
        raise UserError(f"{load_site().source}: container.apptainer: {named} is not a command")
    return named


def need_apptainer(why: str) -> str:
    """Return the command, or raise a `UserError` that says how to get it."""
    found = find_apptainer()
    if found is None:
        raise UserError(f"{why}: {no_apptainer()}")
    return found


def no_apptainer() -> str:
    """Return why there is no Apptainer and what to do."""
    return (
        f"there is no apptainer, neither on the PATH nor at {_private_apptainer()}; "
        "containers/install-apptainer.sh installs one"
    )


def _private_apptainer() -> Path:
    return Path(os.environ.get("APPTAINER_PREFIX") or ".apptainer").absolute() / "bin/apptainer"


def last_words(output: str) -> str:
    """Return the reason that Apptainer gave on stderr, without its label."""
    lines = [line for line in output.splitlines() if line.startswith(("FATAL", "ERROR"))]
    return lines[-1].partition(":")[2].strip() if lines else "apptainer gives no reason"
