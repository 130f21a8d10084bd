"""The site: what site.toml says of the cluster at hand (configs/site.example.toml explains it).

Without a site.toml the private cluster of `make cluster-up` is the site.
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cluster import flags
from runfolder import moments
from runfolder.errors import UserError, did_you_mean

EXAMPLE = Path("configs/site.example.toml")
# Set for a command that came from a laptop, so that it does not look for another machine.
ARRIVED = "SLUICE_ARRIVED"
Folder = Literal["runs", "datasets", "cache", "images"]
# What bash lets nobody set.
OF_BASH = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}
FOLDERS: tuple[Folder, ...] = get_args(Folder)


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Where jobs are queued, and what a node of that partition has."""

    partition: str
    cpus_per_node: int
    gpus_per_node: int
    cluster: str = ""
    """Of several on one accounting; empty: what SLURM_CLUSTERS says, or the one at hand."""
    account: str = ""
    qos: str = ""
    gpu_type: str = ""
    memory_per_node_mb: int = 0
    """0 leaves the memory to Slurm's own default."""
    sbatch_flags: list[str] = field(default_factory=list)
    save_s: int = 300
    """Seconds before the time limit at which a job is asked to save."""


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Folders; those that all nodes share are the checkout's own where nothing is said."""

    scratch: str
    """On each node; $NAME in it is that variable as the node has it."""
    runs: str = ""
    datasets: str = ""
    cache: str = ""
    images: str = ""
    copy_datasets: bool = False
    """Whether a job copies what it reads to the scratch of each node first."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """How Apptainer is had, and what a container of this site sees besides."""

    variant: Literal["cuda", "cpu"] = "cuda"
    """The image of jobs; with "cpu" they train on CPUs, whatever GPUs they ask for."""
    apptainer: str = ""
    modules: list[str] = field(default_factory=list)
    binds: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    verify_key: str = ""


@dataclass(frozen=True, kw_only=True)
class Network:
    """How nodes reach each other."""

    interface: str = ""
    address_suffix: str = ""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What an allocation must have before a job starts in it."""

    all_reduce_floor_mb_per_second: int = 0
    max_clock_skew_s: float = 5.0
    min_free_memory_mb: int = 1024
    min_free_gpu_fraction: float = 0.9
    min_free_scratch_mb: int = 512
    timeout_s: int = 50


@dataclass(frozen=True, kw_only=True)
class Ssh:
    """How the cluster is reached from a machine that is no part of it."""

    host: str = ""
    """The login node, as `ssh` knows it; empty where commands are given on the login node."""
    user: str = ""
    port: int = 0
    """0: what `ssh` takes."""
    config: str = ""
    """A file to read instead of ~/.ssh/config."""
    folder: str = "sluice"
    """Sluice's folder on the cluster, from the home folder there; all nodes share it."""
    modules: list[str] = field(default_factory=list)
    """What has to be loaded there before there is a Python that is new enough."""
    backend: Literal["paramiko", "openssh"] = "paramiko"


@dataclass(frozen=True, kw_only=True)
class Site:
    """All of it."""

    slurm: Slurm
    paths: Paths
    container: Container = field(default_factory=Container)
    network: Network = field(default_factory=Network)
    preflight: Preflight = field(default_factory=Preflight)
    ssh: Ssh = field(default_factory=Ssh)
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the training processes, such as NCCL_IB_HCA."""
    source: Path | None = None
    """The file; None for the private cluster."""

    @property
    def is_private(self) -> bool:
        """Whether it is the cluster of `make cluster-up`."""
        return self.source is None

    @property
    def is_elsewhere(self) -> bool:
        """Whether this machine, a laptop, is no part of it, and commands go there by SSH."""
        there = self.is_private or os.environ.get(ARRIVED) or shutil.which("sbatch")
        return bool(self.ssh.host) and not there


# The private cluster's nodes (slurm/local/up.sh). Their GPUs are simulated, so that jobs that ask
# for some are scheduled as on any cluster, and train on the CPU.
PRIVATE = Site(
    slurm=Slurm(partition="gpu", cpus_per_node=4, gpus_per_node=2, save_s=20),
    paths=Paths(scratch="/var/tmp"),
    container=Container(variant="cpu"),
    # All nodes share one machine, which may be busy with the jobs of both.
    preflight=Preflight(
        min_free_memory_mb=256, min_free_scratch_mb=64, max_clock_skew_s=60, timeout_s=300
    ),
)


def load() -> Site:
    """Return the site of site.toml, or of the file that $SLUICE_SITE names; else the private one.

    Raises:
        UserError: the file is not as the example says.
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
        raise UserError(f"{path}: is not TOML: {error}; {EXAMPLE} shows how it looks") from None
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
            parts[name] = _environment(path, table)
        else:
            parts[name] = _section(path, name, kind, table)
    return Site(**parts, source=path)


def of_this_machine() -> Site:
    """Return the site without what holds on the cluster alone, where this machine is a laptop."""
    site = load()
    if not site.is_elsewhere:
        return site
    return replace(site, paths=Paths(scratch="/tmp"), container=Container(), environment={})


def folder(kind: Folder) -> Path:
    """Return a shared folder: $SLUICE_RUNS and the like, else site.toml's, else the checkout's.

    Raises:
        UserError: site.toml's has a variable in it that is not set.
    """
    if given := os.environ.get(f"SLUICE_{kind.upper()}"):
        return Path(given)
    site = of_this_machine()
    if named := getattr(site.paths, kind):
        return Path(_expanded(site.source, f"paths.{kind}", named))
    own = Path(kind) if here() == Path.cwd() else here() / kind
    if not own.is_symlink():
        return own
    # What is brought from a laptop has links to folders that stay, and its own place does not.
    stays = Path(os.path.normpath(here() / own.readlink()))
    return stays if _is_same(stays, own) else own.resolve()


def here() -> Path:
    """Return the current folder under the name by which the user came to it.

    The nodes may know a file system by another path than the login node does, and links are how a
    site evens that out: where /home/ada leads to /nfs7/ada here, a node may have the first alone.
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
    site = of_this_machine()
    if not os.environ.get(f"SLUICE_{kind.upper()}") and getattr(site.paths, kind):
        return f"{site.source}: paths.{kind}"
    return f"SLUICE_{kind.upper()}"


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
            raise UserError(
                f"{path}: {section}.{name} is missing; {EXAMPLE} says what belongs there"
            )
    # On the cluster nobody asks for it, and a variable may be the laptop's own.
    if kind is Ssh and not os.environ.get(ARRIVED):
        values["config"] = _expanded(path, f"{section}.config", values.get("config", ""))
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


def _environment(path: Path, table: dict[str, Any]) -> dict[str, str]:
    for name, value in table.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"{path}: environment.{name}: is not the name of a variable")
        is_ours = name.startswith("SLUICE_") and name != moments.VARIABLE
        if is_ours or name in OF_BASH:
            raise UserError(f"{path}: environment.{name}: has a meaning of its own; leave it out")
        if not isinstance(value, str):
            raise UserError(f"{path}: environment.{name}: {value!r} is not a string in quotes")
    return dict(table)


def _expanded(path: Path | None, key: str, value: str) -> str:
    expanded = os.path.expandvars(os.path.expanduser(value))  # noqa: PTH111 a "" stays one
    if unknown := re.search(r"\$\{?(\w+)", expanded):
        raise UserError(f"{path}: {key}: ${unknown[1]} is not set in your environment")
    return expanded
