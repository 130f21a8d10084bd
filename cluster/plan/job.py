"""An experiment: what a file of configs/jobs says besides the script's own settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from runfolder.errors import UserError, did_you_mean

JOBS = Path("configs/jobs")
STRATEGIES = Path("configs/accelerate")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the job asks a cluster for."""

    nodes: int = 1
    gpus_per_node: int = 1
    time: str = "01:00:00"
    """Slurm's notation: [days-]hours:minutes:seconds."""
    max_restarts: int = 5


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job file."""

    name: str
    path: Path
    script: Path
    resources: Resources

    @property
    def module(self) -> str:
        """The script as a module: train/labs/rag/script.py is train.labs.rag.script."""
        return ".".join(self.script.with_suffix("").parts)


def load_job(name: str) -> Job:
    """Return the job of configs/jobs/`name`.yaml.

    Raises:
        UserError: there is none, or it is not a job.
    """
    path = _named(JOBS, "JOB", name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid YAML: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a mapping with script, resources and arguments")
    _check_keys(path, "", content, {"script", "resources", "arguments"})
    script = content.get("script")
    if not isinstance(script, str) or not re.fullmatch(r"train/[\w/]+\.py", script):
        raise UserError(f"{path}: script: '{script}' is not a path such as train/tinyllama.py")
    if not Path(script).is_file():
        raise UserError(f"{path}: script: {script} does not exist; check the spelling")
    resources = _resources(path, content.get("resources"))
    return Job(name=name, path=path, script=Path(script), resources=resources)


def strategy_file(name: str) -> Path:
    """Return configs/accelerate/`name`.yaml.

    Raises:
        UserError: there is none.
    """
    return _named(STRATEGIES, "ACCEL", name)


def _named(folder: Path, variable: str, name: str) -> Path:
    known = {file.stem: file for file in folder.glob("*.yaml")}
    if name not in known:
        hint = did_you_mean(Path(name).stem, known)
        raise UserError(f"{variable}={name}: there is no {folder}/{name}.yaml{hint}")
    return known[name]


def _resources(path: Path, content: Any) -> Resources:
    content = content or {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: 'resources' is not a mapping")
    _check_keys(path, "resources.", content, {field.name for field in fields(Resources)})
    for key, least in (("nodes", 1), ("gpus_per_node", 0), ("max_restarts", 0)):
        value = content.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(
                f"{path}: resources.{key}: '{value}' must be a whole number, at least {least}"
            )
    time = content.get("time", Resources.time)
    if not isinstance(time, str) or not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", time):
        raise UserError(
            f"{path}: resources.time: '{time}' is not a time such as \"04:00:00\" (in quotes)"
        )
    return Resources(**content)


def _check_keys(path: Path, prefix: str, content: dict[str, Any], known: set[str]) -> None:
    for key in content:
        if key not in known:
            raise UserError(
                f"{path}: '{prefix}{key}' is not a setting" + did_you_mean(str(key), known)
            )
