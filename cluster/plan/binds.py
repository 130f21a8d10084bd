"""Which folders of the host a container sees, and where.

A run's own container sees a few folders at fixed paths (slurm/node.sh). Commands before and after
a run read what the user names, so the host's folders are bound read-only at their own paths, and a
path means the same inside and outside.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.site.settings import Site
from runfolder.errors import UserError

# The folders in / that the image has itself. /tmp is the container's own.
SYSTEM = {"boot", "dev", "etc", "lost+found", "opt", "proc", "run", "sys", "tmp", "usr", "var"}
SYSTEM |= {"bin", "sbin", "lib", "lib32", "lib64", "libx32"}
# A folder bound on one of these, or above, would hide part of the image.
OF_THE_IMAGE = [Path("/", name) for name in SYSTEM - {"opt", "tmp", "var", "run"}]
OF_THE_IMAGE.append(Path("/opt/sluice"))
# What slurm/node.sh binds.
OF_THE_RUN = [Path("/workspace"), Path("/datasets"), Path("/run-folder"), Path("/cache")]


# ---- the host's folders at their own paths --------------------------------------------------


def own_places(read: Iterable[Path], write: Iterable[Path]) -> list[str]:
    """Return binds for these paths, and for most of the host, at their paths on the host.

    Raises:
        UserError: a path is one that the image has itself.
    """
    modes: dict[Path, str] = {}
    for path in _top_level():
        modes[path] = "ro"
    for path, mode in [(path, "ro") for path in read] + [(path, "rw") for path in write]:
        real = path.resolve()
        for place in (real, path.absolute()):
            # A link is visible if its folder is.
            if place == real or not any(parent in modes for parent in place.parents):
                _check_place(place)
                modes[place] = "rw" if "rw" in (mode, modes.get(place)) else "ro"
    kept: dict[Path, str] = {}
    for place in sorted(modes):
        above = next((kept[parent] for parent in place.parents if parent in kept), None)
        if above != modes[place] and above != "rw":
            kept[place] = modes[place]
    return [bind(place, place, mode) for place, mode in kept.items()]


def _top_level() -> Iterator[Path]:
    for path in Path("/").iterdir():
        if path.name not in SYSTEM and path.is_dir() and os.access(path, os.R_OK | os.X_OK):
            yield path


def _check_place(path: Path) -> None:
    for own in OF_THE_IMAGE:
        inside = path.is_relative_to(own) and not path.is_relative_to("/usr/local/")
        # A single file there hides nothing else.
        hides = own.is_relative_to(path) or (inside and (path.is_dir() or own.name == "sluice"))
        if hides and path.parts[:2] != ("/", "dev"):
            raise UserError(
                f"{path}: conflicts with the image's own {own}; move it, or use RUNTIME=host"
            )


def bind(source: Path, target: Path, mode: str) -> str:
    """Return a line of binds, as slurm/container.sh expects them.

    Raises:
        UserError: it would not be one line of three parts.
    """
    for path in (source, target):
        if ":" in str(path) or "\n" in str(path):
            raise UserError(
                f"{str(path)!r}: a path with a colon cannot be bound; rename it, or use "
                "RUNTIME=host"
            )
    return f"{source}:{target}:{mode}"


def named_paths(arguments: Iterable[str]) -> list[Path]:
    """Return the existing paths in the words of a command and in its settings files."""
    found = []
    for word in arguments:
        if word.startswith(("--prompt=", "--question=", "--system=")):
            continue  # text, whatever it looks like
        value = word.partition("=")[2] if word.startswith("--") and "=" in word else word
        if path := _existing(value):
            found.append(path)
            found += _in_settings(path)
    return found


def _in_settings(path: Path) -> list[Path]:
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return []
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        # The script that reads the settings says what is wrong with them.
        return []
    return [found for text in _strings(content) if (found := _existing(text))]


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    for part in content.values() if isinstance(content, dict) else ():
        yield from _strings(part)


def _existing(text: str) -> Path | None:
    if not text or text.startswith("-"):
        return None
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        # Too long for a path, or not one at all: a prompt, for instance.
        return None


def argument_binds(words: Iterable[str]) -> list[str]:
    """Return binds for what exists of the absolute paths on a script's command line, at its place.

    Raises:
        UserError: it lies where a run's container has something else.
    """
    found = {path.absolute() for path in named_paths(words) if path.is_absolute()}
    for path in found:
        _check_place(path)
        _check_free(path)
    return [bind(path.resolve(), path, "ro") for path in sorted(found)]


def _check_free(target: Path) -> None:
    for own in OF_THE_RUN:
        if target.is_relative_to(own):
            raise UserError(
                f"{target}: conflicts with {own} in the container of a run; move it, or "
                "use RUNTIME=host"
            )


def site_bind(site: Site, text: str) -> str:
    """Return a line of container.binds in site.toml as slurm/container.sh expects it.

    Raises:
        UserError: it has another form, or lies where a run's container has something else.
    """
    parts = text.split(":")
    mode = parts.pop() if parts[-1] in ("ro", "rw") else "ro"
    if len(parts) not in (1, 2) or not all(part.startswith("/") for part in parts):
        raise UserError(
            f"{site.source}: container.binds: '{text}' is not SOURCE:TARGET:ro with absolute paths"
        )
    for own in OF_THE_RUN:
        if Path(parts[-1]).is_relative_to(own):
            raise UserError(
                f"{site.source}: container.binds: '{text}' would hide the run's own {own}; "
                "bind it elsewhere"
            )
    return bind(Path(parts[0]), Path(parts[-1]), mode)


def certificates(environment: Mapping[str, str]) -> list[Path]:
    """Return the host's certificates and token that the environment names and that exist."""
    names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HF_TOKEN_PATH")
    paths = [Path(environment[name]) for name in names if environment.get(name)]
    return [path for path in paths if path.is_file()]


# ---- what else a run reads ------------------------------------------------------------------


def extra_binds(config: Any, datasets: Path) -> list[str]:
    """Return binds for what a resolved config reads from outside the datasets folder.

    These are the user's own model folders, at their own paths, and the targets of links.

    Raises:
        UserError: one is at a path where a run's container has something else.
    """
    staged = config.get("staged") if isinstance(config, dict) else None
    binds: dict[Path, Path] = {}
    for name in staged.values() if isinstance(staged, dict) else ():
        if not isinstance(name, str):
            continue
        path = datasets / name
        if Path(name).is_absolute():
            binds[path] = path.resolve()
            # In the hub's cache, files are links to another folder.
            for file in path.iterdir() if path.is_dir() else ():
                target = (
                    Path(os.path.normpath(path / file.readlink())) if file.is_symlink() else path
                )
                if not target.is_relative_to(path):
                    binds[target] = file.resolve()
        elif not path.resolve().is_relative_to(datasets.resolve()):
            binds[path.resolve()] = path.resolve()
    for target in binds:
        _check_place(target)
        _check_free(target)
    return [bind(binds[target], target, "ro") for target in sorted(binds)]
