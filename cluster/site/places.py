"""The folders that a site's nodes share, and the current one, by paths that nodes know."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.site.file import site_of_this_machine
from cluster.site.settings import Folder
from cluster.site.variables import expanded


def folder(kind: Folder) -> Path:
    """Return a shared folder: $SLUICE_RUNS and the like, else site.toml's, else the checkout's.

    Raises:
        UserError: the path in site.toml has a variable that is not set.
    """
    if given := os.environ.get(f"SLUICE_{kind.upper()}"):
        return Path(given)
    site = site_of_this_machine()
    if named := getattr(site.paths, kind):
        return Path(expanded(site.source, f"paths.{kind}", named))
    own = Path(kind) if here() == Path.cwd() else here() / kind
    if not own.is_symlink():
        return own
    # A checkout copied from a laptop has links to folders that are kept; the checkout is not.
    stays = Path(os.path.normpath(here() / own.readlink()))
    return stays if _is_same(stays, own) else own.resolve()


def here() -> Path:
    """Return the current folder by the path that the user took.

    The nodes may know a file system by another path than the login node does, and a site hides that
    with links: if /home/ada links to /nfs7/ada here, a node may have only the first.
    """
    named = Path(os.environ.get("PWD", ""))
    is_plain = named.is_absolute() and ".." not in named.parts
    return named if is_plain and _is_same(named, Path()) else Path.cwd()


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def folder_setting(kind: Folder) -> str:
    """Return where that folder is set, for messages."""
    site = site_of_this_machine()
    if not os.environ.get(f"SLUICE_{kind.upper()}") and getattr(site.paths, kind):
        return f"{site.source}: paths.{kind}"
    return f"SLUICE_{kind.upper()}"
