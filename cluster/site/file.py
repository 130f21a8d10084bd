"""The site: site.toml, read and checked; without one, the private cluster."""

from __future__ import annotations

import os
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.site import faults
from cluster.site.settings import ARRIVED, EXAMPLE, PRIVATE, Container, Paths, Site, Ssh
from cluster.site.variables import expanded
from runfolder.errors import UserError


class SiteError(UserError):
    """The site's file cannot be used; the text is its first fault, and how many more there are."""

    def __init__(self, *faults: str) -> None:
        many = len(faults)
        more = f" (1 of {many} faults: `make check-site` lists them all)" if many > 1 else ""
        super().__init__(faults[0] + more)
        self.faults = faults


def load_site() -> Site:
    """Return the site of site.toml, or of the file that $SLUICE_SITE names; else the private one.

    Raises:
        SiteError: the file does not follow the example.
    """
    given = os.environ.get("SLUICE_SITE")
    path = Path(given or "site.toml")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if given:
            raise SiteError(f"SLUICE_SITE={given}: there is no such file") from None
        config = Path(os.environ.get("SLUICE_CLUSTER", ".cluster"), "ssh/client_config")
        return replace(PRIVATE, ssh=Ssh(host="login", config=str(config)))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SiteError(f"{path}: is not valid TOML: {error}; {EXAMPLE} shows the format") from None
    except OSError as error:
        raise SiteError(f"{path}: cannot be read: {error.strerror}") from None
    if found := list(faults.faults(content)):
        raise SiteError(*(f"{path}: {fault}" for fault in found))
    parts: dict[str, Any] = {
        name: table if name == "environment" else faults.SECTIONS[name](**table)
        for name, table in content.items()
    }
    site = Site(**parts, source=path)
    # On the cluster it is not used, and a variable may be set only on the laptop.
    if os.environ.get(ARRIVED):
        return site
    return replace(
        site, ssh=replace(site.ssh, config=expanded(path, "ssh.config", site.ssh.config))
    )


def site_of_this_machine() -> Site:
    """Return the site; on a laptop, without the settings that apply only on the cluster."""
    site = load_site()
    if not site.is_elsewhere:
        return site
    return replace(site, paths=Paths(scratch="/tmp"), container=Container(), environment={})
