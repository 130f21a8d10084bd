"""An experiment: what a job file says besides the script's own settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from cluster.plan import program
from cluster.plan.program import Program, Signal
from cluster.site.variables import check_variables
from runfolder.errors import UserError, did_you_mean
from runfolder.records import SCRIPT_FOLDER

JOBS = Path("configs/jobs")
STRATEGIES = Path("configs/accelerate")
KINDS = ("script", "module", "command")
# What only a script that is not ours needs to say.
OF_PROGRAMS = {"resume_arguments", "dry_run_arguments", "checkpoints", "signal"}
OF_PROGRAMS |= {"independent_ranks"}
KEYS = {*KINDS, "folder", "resources", "arguments", "environment", "mail", "after", *OF_PROGRAMS}
# What a job that requeues itself is worth a mail for; all of them: man sbatch, --mail-type.
MAIL_TYPES = {"NONE", "BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT"}
MAIL_TYPES |= {"TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50"}


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
    module: str
    """Of ours: train/labs/rag/script.py is train.labs.rag.script; else `program.MODULE`."""
    resources: Resources
    environment: dict[str, str] = field(default_factory=dict)
    mail: list[str] = field(default_factory=list)
    """sbatch's options by which Slurm sends mail."""
    after: str = ""
    """The run, as RUN= takes it, that has to finish first."""
    program: Program | None = None
    """None for a script of ours."""
    script_folder: Path | None = None
    """The folder of a script outside the checkout, of which the run gets a copy."""


def load_job(name: str) -> Job:
    """Return the job of configs/jobs/`name`.yaml, or of the file `name`.

    Raises:
        UserError: there is none, or it is not a job.
    """
    path = _job_file(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid YAML: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a mapping with script, resources and arguments")
    _check_keys(path, "", content, KEYS)
    kinds = [kind for kind in KINDS if kind in content]
    if len(kinds) != 1:
        found = f"both {' and '.join(kinds)}" if kinds else "none of them"
        raise UserError(f"{path}: give one of script, module or command; it has {found}")
    job: dict[str, Any] = {"name": path.stem, "path": path}
    job["resources"] = _resources(path, content.get("resources"))
    job["environment"] = _environment(path, content.get("environment"))
    job["mail"] = _mail(path, content.get("mail"))
    job["after"] = content.get("after") or ""
    if not isinstance(job["after"], str):
        raise UserError(f"{path}: after: {job['after']!r} is not a run, such as tinyllama/STAMP")
    what = content[kinds[0]]
    if not isinstance(what, str) or not what.strip():
        raise UserError(f"{path}: {kinds[0]}: {what!r} is not a name")
    root = _folder(path, content.get("folder"))
    if kinds[0] != "script":
        if not re.fullmatch(r"[\w.-]+", what):
            raise UserError(f"{path}: {kinds[0]}: '{what}' is not the name of a {kinds[0]}")
        job["script_folder"] = root
        return Job(**job, module=program.MODULE, program=_program(path, kinds[0], what, content))
    script = _script(path, what)
    if root and not script.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{path}: script: {script} is not in the folder {root}")
    inside = None if root else _in_checkout(script)
    if program.exports_script(script, f"{path}: script"):
        if inside is None:
            raise UserError(
                f"{path}: script: {script} says SCRIPT, as Sluice's own do, and is not in this "
                "checkout; put it below train/"
            )
        if wrong := sorted(OF_PROGRAMS & set(content)):
            raise UserError(f"{path}: {wrong[0]}: is for a script that is not Sluice's; drop it")
        return Job(**job, module=".".join(inside.with_suffix("").parts))
    folder = None if inside else root or script.parent
    within = script.resolve().relative_to(folder.resolve()) if folder else script
    place = str(inside or Path(SCRIPT_FOLDER, within))
    return Job(
        **job,
        module=program.MODULE,
        program=_program(path, "script", place, content),
        script_folder=folder,
    )


def strategy_file(name: str) -> Path:
    """Return configs/accelerate/`name`.yaml.

    Raises:
        UserError: there is none.
    """
    return _named(STRATEGIES, "ACCEL", name)


def _job_file(name: str) -> Path:
    path = Path(name).expanduser()
    if len(path.parts) < 2 and path.suffix not in (".yaml", ".yml"):
        return _named(JOBS, "JOB", name)
    hint = did_you_mean(path.stem, sorted(file.stem for file in JOBS.glob("*.yaml")))
    if path.is_dir() or path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"JOB={name}: is neither the name of a job in {JOBS} nor a .yaml file of yours{hint}"
        )
    if not path.exists():
        raise UserError(f"JOB={name}: there is no such file{hint}")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", path.stem):
        raise UserError(
            f"JOB={name}: the name of a job's file has letters, digits, '.', '_' and '-' only"
        )
    return path


def _named(folder: Path, variable: str, name: str) -> Path:
    known = {file.stem: file for file in folder.glob("*.yaml")}
    if name not in known:
        hint = did_you_mean(Path(name).stem, known)
        raise UserError(f"{variable}={name}: there is no {folder}/{name}.yaml{hint}")
    return known[name]


def _seen_from(path: Path, named: str) -> Path:
    """Return what a job's file names: seen from the checkout, or from that file's own folder."""
    return (Path() if _in_checkout(path) else path.parent) / Path(named).expanduser()


def _script(path: Path, named: str) -> Path:
    script = _seen_from(path, named)
    if script.is_dir():
        raise UserError(f"{path}: script: {script} is a folder; name the file that is started")
    if not script.is_file():
        hint = "check the spelling"
        if (path.parent / named).is_file():
            hint = f"names in a job file of the checkout are seen from it: {path.parent / named}"
        raise UserError(f"{path}: script: {script} does not exist; {hint}")
    if script.suffix != ".py":
        raise UserError(f"{path}: script: {script} is not a .py file; for others take command:")
    return script


def _folder(path: Path, named: object) -> Path | None:
    """Return the folder of a script's code, if the job's file says which."""
    if named is None:
        return None
    if not isinstance(named, str) or not (folder := _seen_from(path, named)).is_dir():
        raise UserError(f"{path}: folder: {named!r} is not a folder")
    return folder


def _in_checkout(path: Path) -> Path | None:
    """Return a path as it is in the checkout, the current folder; None where it lies elsewhere."""
    here, real = Path.cwd().resolve(), path.resolve()
    return real.relative_to(here) if real.is_relative_to(here) else None


def _program(path: Path, kind: Any, name: str, content: dict[str, Any]) -> Program:
    words = {
        key: program.words_of(content.get(key), f"{path}: {key}")
        for key in ("arguments", "resume_arguments", "dry_run_arguments")
    }
    place = content.get("checkpoints", Program.checkpoints)
    if not isinstance(place, str) or not place or {"..", "/"} & set(Path(place).parts):
        raise UserError(f"{path}: checkpoints: {place!r} is not a path below the run's folder")
    signal = content.get("signal", Program.signal)
    if signal not in get_args(Signal):
        raise UserError(f"{path}: signal: {signal!r} is not one of {', '.join(get_args(Signal))}")
    independent = content.get("independent_ranks", False)
    if not isinstance(independent, bool):
        raise UserError(f"{path}: independent_ranks: {independent!r} is not true or false")
    return Program(
        kind=kind,
        name=name,
        checkpoints=place,
        signal=signal,
        independent_ranks=independent,
        **words,
    )


def _environment(path: Path, content: Any) -> dict[str, str]:
    content = content or {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: 'environment' is not a mapping")
    return check_variables(path, content)


def _mail(path: Path, content: Any) -> list[str]:
    """Return sbatch's options for `mail: ADDRESS`, or {user: ADDRESS, type: [END, FAIL]}."""
    if content is None:
        return []
    if not isinstance(content, dict):
        content = {"user": content}
    _check_keys(path, "mail.", content, {"user", "type"})
    user, types = content.get("user"), content.get("type", ["END", "FAIL"])
    if not isinstance(user, str) or not re.fullmatch(r"[\w.+-]+(@[\w.-]+)?", user):
        raise UserError(f"{path}: mail: {user!r} is not an address, such as ada@example.edu")
    types = [types] if isinstance(types, str) else types
    if not isinstance(types, list) or not types:
        raise UserError(f"{path}: mail.type: {types!r} is not a list such as [END, FAIL]")
    for each in types:
        if each not in MAIL_TYPES:
            hint = did_you_mean(str(each), sorted(MAIL_TYPES))
            raise UserError(f"{path}: mail.type: '{each}' is not a type of mail{hint}")
    return [f"--mail-user={user}", f"--mail-type={','.join(types)}"]


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
