"""What site.toml may say about a cluster; configs/site.example.toml explains it line by line."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

EXAMPLE = Path("configs/site.example.toml")
# Set for a command that came from a laptop, so that it does not look for another machine.
ARRIVED = "SLUICE_ARRIVED"
Folder = Literal["runs", "datasets", "cache", "images"]
FOLDERS: tuple[Folder, ...] = get_args(Folder)


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Where jobs are queued, and what a node of that partition has."""

    partition: str
    cpus_per_node: int
    gpus_per_node: int
    cluster: str = ""
    """If several share an accounting database; empty: that of SLURM_CLUSTERS, or the local one."""
    account: str = ""
    qos: str = ""
    gpu_type: str = ""
    gpu_memory_gib: int = 0
    """0: unknown; `make submit PLAN=1` says then what a job needs, but not whether it fits."""
    memory_per_node_mb: int = 0
    """0 leaves the memory to Slurm's own default."""
    sbatch_flags: list[str] = field(default_factory=list)
    save_s: int = 300
    """Seconds before the time limit at which a job is asked to save."""


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Folders; those that all nodes share default to the checkout's own."""

    scratch: str
    """On each node; $NAME in it is the node's own variable."""
    runs: str = ""
    datasets: str = ""
    cache: str = ""
    images: str = ""
    copy_datasets: bool = False
    """Whether a job copies what it reads to the scratch of each node first."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """Where Apptainer comes from, and what else a container sees at this site."""

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
    """How to reach the cluster from a machine outside it."""

    host: str = ""
    """The login node, as `ssh` knows it; empty if commands are given on the login node."""
    user: str = ""
    port: int = 0
    """0: the default of `ssh`."""
    config: str = ""
    """A file to read instead of ~/.ssh/config."""
    folder: str = "sluice"
    """Sluice's folder on the cluster, relative to the home folder; all nodes share it."""
    modules: list[str] = field(default_factory=list)
    """Modules to load there to get a Python that is new enough."""
    backend: Literal["paramiko", "openssh"] = "paramiko"


@dataclass(frozen=True, kw_only=True)
class Site:
    """All settings of a site."""

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
        """Whether this machine is a laptop outside the cluster, so commands run there over SSH."""
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
