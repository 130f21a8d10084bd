"""The site: site.toml, read and checked; without one, the private cluster."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cluster.site import flags
from cluster.site.settings import ARRIVED, PRIVATE, Container, Paths, Site, Ssh
from runfolder import moments
from runfolder.errors import UserError, did_you_mean

EXAMPLE = Path("configs/site.example.toml")
# Variables that are read-only in bash.
OF_BASH = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}


def load_site() -> Site:
    """Return the site of site.toml, or of the file that $SLUICE_SITE names; else the private one.

    Raises:
        UserError: the file does not follow the example.
    """
    given = os.environ.get("SLUICE_SITE")
    path = Path(given or "site.toml")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if given:
            raise UserError(f"SLUICE_SITE={given}: there is no such file") from None
        config = Path(os.environ.get("SLUICE_CLUSTER", ".cluster"), "ssh/client_config")
        return replace(PRIVATE, ssh=Ssh(host="login", config=str(config)))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid TOML: {error}; {EXAMPLE} shows the format") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    parts: dict[str, Any] = {}
    kinds = {name: kind for name, kind in get_type_hints(Site).items() if name != "source"}
    _check_known(path, "", content, kinds)
    for name, kind in kinds.items():
        table = content.get(name, {})
        if not isinstance(table, dict):
            raise UserError(f"{path}: '{name}' is not a table; write [{name}]")
        if name == "environment":
            parts[name] = check_variables(path, table)
        else:
            parts[name] = _section(path, name, kind, table)
    return Site(**parts, source=path)


def site_of_this_machine() -> Site:
    """Return the site; on a laptop, without the settings that apply only on the cluster."""
    site = load_site()
    if not site.is_elsewhere:
        return site
    return replace(site, paths=Paths(scratch="/tmp"), container=Container(), environment={})


def _section(path: Path, section: str, kind: Any, table: dict[str, Any]) -> Any:
    known: dict[str, Field[Any]] = {entry.name: entry for entry in fields(kind)}
    _check_known(path, f"{section}.", table, known)
    hints = get_type_hints(kind)
    values = {}
    for name, entry in known.items():
        if name in table:
            _check_value(path, f"{section}.{name}", table[name], hints[name])
            values[name] = table[name]
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(f"{path}: {section}.{name} is missing; {EXAMPLE} explains it")
    # On the cluster it is not used, and a variable may be set only on the laptop.
    if kind is Ssh and not os.environ.get(ARRIVED):
        values["config"] = expanded(path, f"{section}.config", values.get("config", ""))
    return kind(**values)


def _check_known(path: Path, prefix: str, table: dict[str, Any], known: Any) -> None:
    for key in table:
        if key not in known:
            raise UserError(f"{path}: '{prefix}{key}' is not a setting{did_you_mean(key, known)}")


def _check_value(path: Path, key: str, value: Any, kind: Any) -> None:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choices = " or ".join(f'"{choice}"' for choice in get_args(kind))
            raise UserError(f"{path}: {key}: {value!r} is not {choices}")
        return
    if get_origin(kind) is list:
        good = isinstance(value, list) and all(isinstance(part, str) for part in value)
        wanted = 'a list of strings, such as ["--constraint=a100"]'
    elif kind is str:
        good, wanted = isinstance(value, str), "a string in quotes"
    elif kind is bool:
        good, wanted = isinstance(value, bool), "true or false"
    else:
        numbers = (int, float) if kind is float else int
        good = isinstance(value, numbers) and not isinstance(value, bool) and value >= 0
        wanted = f"a {'' if kind is float else 'whole '}number, at least 0"
    if key == "ssh.host" and good and not re.fullmatch(r"([^\s-]\S*)?", value):
        good, wanted = False, "the name of a machine"
    if key == "ssh.folder" and good and value.strip("./~ ") == "":
        good, wanted = False, 'a folder of its own, such as "sluice"'
    if good and key.endswith(("partition", "cpus_per_node", "scratch")) and not value:
        good, wanted = False, "filled in"
    if not good:
        raise UserError(f"{path}: {key}: {value!r} must be {wanted}")
    if key == "slurm.sbatch_flags" and (problem := flags.problem(value)):
        raise UserError(f"{path}: {key}: {problem}")


def check_variables(path: Path, table: dict[str, Any]) -> dict[str, str]:
    """Return the variables that a file sets for the processes of a run.

    Raises:
        UserError: one has no name of a variable, or one that is not the file's to set.
    """
    for name, value in table.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"{path}: environment.{name}: is not a valid variable name")
        is_ours = name.startswith("SLUICE_") and name != moments.VARIABLE
        if is_ours or name in OF_BASH:
            raise UserError(f"{path}: environment.{name}: is reserved; leave it out")
        if not isinstance(value, str):
            raise UserError(f"{path}: environment.{name}: {value!r} must be a string in quotes")
    return dict(table)


def expanded(path: Path | None, key: str, value: str) -> str:
    """Return a path of site.toml with `~` and the user's own variables in it replaced.

    Raises:
        UserError: a variable is not set.
    """
    expanded = os.path.expandvars(os.path.expanduser(value))  # noqa: PTH111 "" stays ""
    if unknown := re.search(r"\$\{?(\w+)", expanded):
        raise UserError(f"{path}: {key}: ${unknown[1]} is not set in your environment")
    return expanded
